"""The sampler: one session writes a batch of sequences, step by step, with a key-value cache.

What a sample becomes depends on its seed and the settings alone, not on batch, neighbours, streaming or device. The
plain sampler in `tests/sampler/plain.py` says in thirty lines what this file does fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from vision_ar.generator import Generator
from vision_ar.interfaces import FREE, AttentionPattern, Draw, Head, Step, Tokenizer, Tokens, TokenSpec
from vision_ar.sampler.guidance import CfgSchedule, guide_logits
from vision_ar.sampler.logits import Law, draw
from vision_ar.sampler.loop import TokenLoop
from vision_ar.sampler.memory import check_batch
from vision_ar.sampler.overlap import PreviewQueue
from vision_ar.shapes import check_shape


@dataclass
class Condition:
    """What new sequences are conditioned on.

    Args:
        labels: class ids, (B,), or None.
        cond: features, (B, S, D), or None.
        cond_mask: True for real features, (B, S), or None.
    """

    labels: Tensor | None = None
    cond: Tensor | None = None
    cond_mask: Tensor | None = None

    def __len__(self) -> int:
        """Rows."""
        return next((len(part) for part in vars(self).values() if part is not None), 0)

    def __getitem__(self, rows: slice) -> Condition:
        """Some rows."""
        return Condition(**{name: None if part is None else part[rows] for name, part in vars(self).items()})


@dataclass
class Event:
    """One thing that happened while sampling.

    Args:
        kind: tokens (new ones were written), preview (a group is complete and can be shown) or done.
        ids: all ids so far, (B, T), `FREE` where not yet written.
        written: number of tokens written per sample.
        preview: images or other data that can be shown now, or None.
    """

    kind: str
    ids: Tensor
    written: int
    preview: Tensor | None = None


class Session:
    """Writes one batch of sequences with one generator.

    Args:
        generator: backbone and heads, in evaluation mode.
        condition: of the rows.
        seeds: one per row, (B,), int64.
        law: temperature and filters, or one per row.
        cfg_schedule: guidance over the sequence; None is off; or one per row.
        forced: tokens that are already decided, (B, T), `FREE` where the model chooses.
        fixed: write one token after the other as a fixed program, a CUDA graph on a GPU, where model and settings
            allow it; None is on for a GPU and off for a CPU, which reads less without.
        compile: the same, taken by `torch.compile`.
        cache_dtype: of keys and values, float8_e4m3fn for half the bytes; None is that of the weights.
    """

    def __init__(
        self,
        generator: Generator,
        condition: Condition,
        seeds: Tensor,
        law: Law | Sequence[Law] = Law(),  # noqa: B008 immutable
        cfg_schedule: CfgSchedule | None | Sequence[CfgSchedule | None] = None,
        forced: Tensor | None = None,
        fixed: bool | None = None,
        compile: bool = False,  # noqa: A002 named as users name it
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        spec, batch_size = generator.spec, seeds.shape[0]
        steps = generator.objective.steps(spec)
        if steps is None:
            raise ValueError(f"a model trained with {type(generator.objective).__name__} cannot write sequences")
        check_shape("seeds", seeds, "B")
        self.generator, self._laws, self._steps = generator, rows_by_law(law, batch_size), list(steps)
        device = next(generator.parameters()).device
        self._seeds = seeds.to(device)
        self._forced = check_forced(forced, batch_size, spec, device)
        scales = guidance_scales(cfg_schedule, batch_size, spec.seq_len)
        self._scales = None if scales is None else scales.to(device).contiguous()
        self.ids = torch.full((batch_size, spec.seq_len), FREE, device=device)
        self._tokens = self._lay_out(condition, device)
        backbone = generator.backbone
        check_batch(generator, batch_size, scales is not None, cache_dtype)  # before the cache is taken
        self.positions = backbone.place(self._tokens)
        self.cache = backbone.new_cache(self._tokens.batch_size, dtype=cache_dtype)
        self._next = 0
        self._no_gradient = torch.no_grad if compile else torch.inference_mode  # the compiler takes no inference tensor
        fixed = device.type == "cuda" if fixed is None else fixed
        self._loop = TokenLoop(self, compile) if (fixed or compile) and TokenLoop.can(self, self._steps) else None

    def restart(
        self,
        condition: Condition,
        seeds: Tensor,
        cfg_schedule: CfgSchedule | None | Sequence[CfgSchedule | None] = None,
        forced: Tensor | None = None,
    ) -> None:
        """Begin another batch in place: of the same size and law, guided, forced and conditioned if this one was.

        `SessionPool` knows which batches are alike. What was captured stays good, since no tensor moves.
        """
        values = [(self._seeds, seeds)]
        scales = guidance_scales(cfg_schedule, len(seeds), self.generator.spec.seq_len)
        values += [(self._scales, scales)] if self._scales is not None and scales is not None else []
        forced = check_forced(forced, len(seeds), self.generator.spec, self.ids.device)
        values += [(self._forced, forced)] if self._forced is not None and forced is not None else []
        tokens = self._lay_out(condition, self.ids.device)
        conditions = [(getattr(self._tokens, name), getattr(tokens, name)) for name in ("labels", "cond", "cond_mask")]
        values += [(held, value) for held, value in conditions if held is not None]
        with self._no_gradient():
            for held, value in values:
                held.copy_(value)
            self.ids.fill_(FREE)
            self.cache.restart()
            self._next = 0
            if self._loop is not None:
                self._loop.restart()

    @property
    def fixed(self) -> bool:
        """True when tokens are written by the fixed program."""
        return self._loop is not None

    @property
    def done(self) -> bool:
        """True when every token is written."""
        return self._next == len(self._steps)

    @property
    def written(self) -> int:
        """Number of tokens written per sample."""
        return sum(len(step.fill) for step in self._steps[: self._next])

    @property
    def one_law(self) -> bool:
        """True when all rows have the same law."""
        return len(self._laws) == 1

    @property
    def masked(self) -> bool:
        """True when parts of the condition are padding."""
        return self._tokens.cond_mask is not None

    def step(self) -> Step:
        """Take the next step: read what is new, draw, write; return what was filled.

        Raises:
            RuntimeError: when the sequences are complete.
        """
        if self.done:
            raise RuntimeError("step must not be called on a finished session")
        step = self._steps[self._next]
        with self._no_gradient():
            if self._loop is not None and self._next:
                self._loop.advance()
            else:
                fill = torch.tensor(step.fill, device=self.ids.device)
                self.ids[:, span(step.fill)] = self.choose(self._read(step), fill, step.head)
                if self._loop is not None:
                    self.cache.set_lengths(self.cache.lengths)  # all slots, counted on the device from here on
        self._next += 1
        return step

    def choose(self, hidden: Tensor, fill: Tensor, head: str) -> Tensor:
        """Tokens (B, R) of columns `fill`, (R,), from hidden vectors (B or 2 B, R, D), or those that were forced."""
        rows, reads = self.ids.shape[0], len(fill)
        seeds = self._seeds if reads == 1 else self._seeds.repeat_interleave(reads)
        positions = fill.repeat(rows)
        scales = None if self._scales is None else self._scales[:, fill].flatten()
        draw_from = partial(self._choose, seeds=seeds, positions=positions, scales=scales)
        draws = Draw(seeds, positions, scales, draw_from)
        chosen = cast(Head, self.generator.heads[head]).sample(hidden.flatten(0, 1), draws).unflatten(0, (rows, reads))
        if self._forced is None:
            return chosen
        decided = self._forced[:, fill]
        return torch.where(decided == FREE, chosen, decided)

    def _choose(self, logits: Tensor, seeds: Tensor, positions: Tensor, scales: Tensor | None) -> Tensor:
        """Guidance, law and keyed draw: ids (Q,) of logits (Q or 2 Q, V)."""
        if scales is not None:
            cond, uncond = logits.chunk(2)
            logits = guide_logits(cond, uncond, scales)
        if self.one_law:
            return draw(self._laws[0][0](logits), seeds, positions)
        reads, logprobs = len(logits) // self.ids.shape[0], torch.empty_like(logits, dtype=torch.float32)
        for law, rows in self._laws:
            of_rows = (rows[:, None] * reads + torch.arange(reads)).flatten().to(logits.device)
            logprobs[of_rows] = law(logits[of_rows])
        return draw(logprobs, seeds, positions)

    def _read(self, step: Step) -> Tensor:
        """Hidden vectors at the step's read positions, (B, R, D); rows without condition follow, if there are any."""
        backbone, prefix = self.generator.backbone, self.generator.backbone.prefix_len
        first = self._next == 0
        fed = self.fed(span(step.feed))
        embedded = [backbone.embed_condition(fed)] if first else []
        embedded += [backbone.embed_tokens(fed)] if step.feed else []
        columns = list(range(prefix)) * first + [prefix + column for column in step.feed]
        hidden = backbone(
            torch.cat(embedded, dim=1),
            self.positions[:, span(columns)],
            AttentionPattern(step.attention),
            self.cache,
            cond_mask=self._tokens.cond_mask,
        )
        self.cache.commit()
        # column c of the sequence is at this place among the vectors just computed
        place = {column: number for number, column in enumerate([*range(-prefix, 0)] * first + [*step.feed])}
        return hidden[:, span([place[column] for column in step.read])]

    def fed(self, columns: slice | list[int] | Tensor) -> Tokens:
        """Columns of the sequences as the backbone reads them."""
        tokens, ids = self._tokens, self.ids[:, columns]
        return Tokens(
            positions=tokens.positions[:, columns],
            group=tokens.group[:, columns],
            ids=ids if self._scales is None else ids.repeat(2, 1),
            labels=tokens.labels,
            cond=tokens.cond,
            cond_mask=tokens.cond_mask,
        )

    def _lay_out(self, condition: Condition, device: torch.device) -> Tokens:
        """The whole sequence with its condition; with guidance, unconditional rows follow the conditional ones."""
        parts = {k: v.to(device) for k, v in vars(condition).items() if v is not None}
        ids = self.ids
        if self._scales is not None:
            ids = ids.repeat(2, 1)
            parts = self.generator.backbone.with_null_rows(parts)
        return Tokens.of(self.generator.spec, ids=ids, **parts)


def span(columns: Sequence[int]) -> slice | list[int]:
    """Columns as an index: a slice where they follow each other, which copies nothing."""
    if columns and list(columns) == list(range(columns[0], columns[0] + len(columns))):
        return slice(columns[0], columns[0] + len(columns))
    return list(columns)


def rows_by_law(law: Law | Sequence[Law], batch_size: int) -> list[tuple[Law, Tensor]]:
    """Every law with its rows, (R,); most batches have one."""
    if isinstance(law, Law):
        return [(law, torch.arange(batch_size))]
    if len(law) != batch_size:
        raise ValueError(f"law must be one or one per row, got {len(law)} for {batch_size} rows")
    return [(one, torch.tensor([row for row in range(batch_size) if law[row] == one])) for one in dict.fromkeys(law)]


def guidance_scales(
    cfg_schedule: CfgSchedule | None | Sequence[CfgSchedule | None], batch_size: int, seq_len: int
) -> Tensor | None:
    """cfg_scale of every row and token, (B, T), float32; None when guidance is off throughout."""
    schedules = cfg_schedule if isinstance(cfg_schedule, Sequence) else [cfg_schedule]
    if len(schedules) not in (1, batch_size) or (isinstance(cfg_schedule, Sequence) and len(schedules) != batch_size):
        raise ValueError(f"cfg_schedule must be one or one per row, got {len(schedules)} for {batch_size} rows")
    places = [t / max(1, seq_len - 1) for t in range(seq_len)]
    scales = torch.tensor([[1.0 if one is None else one(place) for place in places] for one in schedules])
    return None if bool((scales == 1).all()) else scales.expand(batch_size, -1)


def check_forced(forced: Tensor | None, batch_size: int, spec: TokenSpec, device: torch.device | str) -> Tensor | None:
    """Forced tokens on the device, checked."""
    if forced is None:
        return None
    check_shape("forced", forced, "B T", B=batch_size, T=spec.seq_len)
    wrong = forced[(forced < FREE) | (forced >= (spec.vocab_size or 0))]
    if len(wrong):
        raise ValueError(f"forced must hold ids below {spec.vocab_size} or {FREE}, got {int(wrong[0])}")
    return forced.to(device)


def stream(session: Session, tokenizer: Tokenizer | None = None, seeds: Tensor | None = None) -> Iterator[Event]:
    """Run a session to its end and tell what happens; with a tokenizer, previews after every group.

    Args:
        session: fresh.
        tokenizer: decodes previews; None leaves them out.
        seeds: of the rows, for decoders that draw noise.
    """
    ends, device = session.generator.spec.ends, session.ids.device
    queue = None
    if tokenizer is not None:
        with torch.inference_mode():
            queue = PreviewQueue(tokenizer.open_preview(session.ids.shape[0], seeds), device)
    group, shown = 0, None
    while not session.done:
        session.step()
        ids = session.ids.clone()
        yield Event("tokens", ids, session.written)
        while group < len(ends) and ends[group] <= session.written:
            if queue is not None:
                with torch.inference_mode():
                    queue.feed(ends[group - 1] if group else 0, ids, ends[group])
            group += 1
        for found in queue.ready(wait=session.done) if queue is not None else ():
            shown = found.images
            yield Event("preview", found.ids, found.written, shown)
    yield Event("done", session.ids.clone(), session.written, shown)
