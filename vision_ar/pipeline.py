"""What users hold: a tokenizer and a generator that sample together.

`vision_ar.load("cifar10-dar").sample(labels=[3, 7], cfg_scale=2.0, seed=0)` is the whole of it; `stream` takes the same
arguments and yields events while the images arrive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_ar.checkpoints.importing import open_model
from vision_ar.checkpoints.store import SavedModel
from vision_ar.generator import Generator
from vision_ar.interfaces import FREE, Tokenizer, Tokens
from vision_ar.layers.packed import pack
from vision_ar.sampler.engine import Condition, Event, Session, guidance_scales, stream
from vision_ar.sampler.guidance import CfgSchedule, cfg_schedule
from vision_ar.sampler.logits import Law
from vision_ar.sampler.memory import check_batch
from vision_ar.sampler.pool import SessionPool
from vision_ar.shapes import check_shape

CACHE_DTYPES = {"float8": torch.float8_e4m3fn}
"""Names of the dtypes of keys and values that are not those of the weights."""


@dataclass
class Settings:
    """How to sample; the defaults of a model come from its `config.yaml`.

    Args:
        cfg_scale: guidance strength; 1 is off.
        cfg_schedule: constant, linear, cosine or interval, or a function of progress in [0, 1].
        cfg_start: strength at the first token, for linear and cosine.
        cfg_interval: progress between which guidance is on, for interval.
        temperature: of the law; 0 is greedy.
        top_k: keep the k most likely tokens; None is off.
        top_p: nucleus filter; None is off.
        min_p: keep tokens at least min_p times as likely as the best; None is off.
    """

    cfg_scale: float = 1.0
    cfg_schedule: str | CfgSchedule = "constant"
    cfg_start: float = 1.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def law(self) -> Law:
        """The law these settings describe; raises ValueError for values out of range."""
        return Law(self.temperature, self.top_k, self.top_p, self.min_p)

    def schedule(self) -> CfgSchedule:
        """The guidance schedule; raises ValueError for values out of range."""
        if callable(self.cfg_schedule):
            return self.cfg_schedule
        begin, end = self.cfg_interval
        return cfg_schedule(self.cfg_schedule, self.cfg_scale, self.cfg_start, begin, end)


@dataclass
class Samples:
    """Finished samples.

    Args:
        images: (B, C, H, W), clamped to [-1, 1].
        ids: their tokens, (B, T).
        labels: their class ids; empty where features were given.
        seeds: their seeds.
        previews: what was visible after each group, (B, groups, C, H, W), or None.
    """

    images: Tensor
    ids: Tensor
    labels: list[int]
    seeds: list[int]
    previews: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """Several batches as one."""
        strips = [part.previews for part in parts if part.previews is not None]
        return cls(
            torch.cat([part.images for part in parts]),
            torch.cat([part.ids for part in parts]),
            [label for part in parts for label in part.labels],
            [seed for part in parts for seed in part.seeds],
            torch.cat(strips) if strips else None,
        )


class Pipeline:
    """A tokenizer and a generator that sample together; made by `vision_ar.load`.

    Args:
        tokenizer: decodes what the generator writes.
        generator: writes tokens.
        class_names: names of the labels in order; may be empty.
        defaults: settings where a call gives none.
        name: of the model.
        digest: of its weights.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        generator: Generator,
        class_names: Sequence[str] = (),
        defaults: dict[str, Any] | None = None,
        name: str = "",
        digest: str = "",
    ) -> None:
        self.tokenizer, self.generator = tokenizer.eval(), generator.eval()
        self.class_names, self.name, self.digest = list(class_names), name, digest
        self.defaults = dict(defaults or {})
        self.quantize: str | None = None
        self.cache_dtype: torch.dtype | None = None
        self._sessions = SessionPool(self.generator)

    @property
    def num_classes(self) -> int:
        """Number of classes that can be asked for."""
        return self.generator.backbone.num_classes

    @property
    def device(self) -> torch.device:
        """Where the generator is."""
        return next(self.generator.parameters()).device

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Pipeline:
        """Move to a device; `dtype` is that of the generator, the tokenizer stays in float32."""
        self.tokenizer.to(device)
        self.generator.to(device, dtype)
        self._sessions = SessionPool(self.generator)
        return self

    def prepare(
        self,
        quantize: str | None = None,
        compile: bool = False,  # noqa: A002 named as users name it
        cache_dtype: str | None = None,
    ) -> Pipeline:
        """Lay the generator's weights out for sampling where it is; it can then neither be trained nor moved.

        Args:
            quantize: int8 or (on a GPU) float8 for weights of 8 bits; None keeps their dtype.
            compile: let `torch.compile` take the step from token to token; it lays weights out itself.
            cache_dtype: float8 for keys and values of 8 bits, on a GPU; None is the dtype of the weights.

        Raises:
            ValueError: for another kind, or one that the device does not have.
        """
        if compile and quantize is not None:
            raise ValueError(f"quantize must be left out with compile, got {quantize}")
        if cache_dtype is not None and cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"cache_dtype must be one of {', '.join(CACHE_DTYPES)}, got {cache_dtype!r}")
        if cache_dtype is not None and self.device.type != "cuda":
            raise ValueError(f"cache_dtype must be left out on {self.device.type}, got {cache_dtype}: it is for a GPU")
        if not compile:
            pack(self.generator, quantize)
        self.quantize = quantize
        self.cache_dtype = None if cache_dtype is None else CACHE_DTYPES[cache_dtype]
        self._sessions = SessionPool(self.generator, compile, self.cache_dtype)
        return self

    def weights(self) -> dict[str, Any]:
        """How the generator's weights are held: what decides rounding beside the settings."""
        dtype = next(self.generator.parameters()).dtype
        held = None if self.cache_dtype is None else str(self.cache_dtype).removeprefix("torch.")
        return {"dtype": str(dtype).removeprefix("torch."), "quantize": self.quantize, "cache_dtype": held}

    def settings(self, **given: Any) -> Settings:
        """Settings of a call: what is given, else the model's defaults, checked."""
        chosen = {**self.defaults, **given}
        known = [field.name for field in dataclasses.fields(Settings)]
        if unknown := chosen.keys() - set(known):
            raise ValueError(f"settings must be among {', '.join(known)}, got {', '.join(sorted(unknown))}")
        settings = Settings(**chosen)
        settings.law()
        settings.schedule()
        return settings

    def check_batch(self, batch_size: int, **settings: Any) -> str:
        """Say what a batch with these settings needs, see `sampler.memory.check_batch`."""
        return check_batch(self.generator, batch_size, self.guided(**settings), self.cache_dtype)

    def guided(self, **settings: Any) -> bool:
        """True when these settings need a second row for every image, without its condition."""
        schedule = self.settings(**settings).schedule()
        return guidance_scales(schedule, 1, self.generator.spec.seq_len) is not None

    def stream(
        self,
        labels: Sequence[int] | Condition,
        seed: int | Sequence[int] = 0,
        forced: Tensor | None = None,
        previews: bool = True,
        each: Sequence[Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> Iterator[Event]:
        """Sample one image per label and tell what happens, token by token.

        Args:
            labels: class ids; for a generator of texts or other features their `Condition`.
            seed: of the first image, image i has seed + i; or one seed per image.
            forced: tokens that are already decided, (B, T), -1 where the model chooses.
            previews: decode after every group.
            each: settings of single images, one mapping per image, on top of those of all.
            **settings: of all images, see `Settings`.

        Returns:
            Iterator of events; the preview of the last group, and of `done`, is the finished image.
        """
        condition = self.condition(labels)
        if each is not None and len(each) != len(condition):
            raise ValueError(f"each must have settings for every image, got {len(each)} for {len(condition)} images")
        chosen = [self.settings(**{**settings, **own}) for own in ([{}] if each is None else each)]
        laws, schedules = [one.law() for one in chosen], [one.schedule() for one in chosen]
        law: Any = laws[0] if each is None else laws
        schedule: Any = schedules[0] if each is None else schedules
        seeds = torch.tensor(spread_seeds(seed, len(condition)))
        asked = (condition, seeds, law, schedule, forced)
        session = self._sessions.open(*asked)  # here, so that wrong settings are told before the first event
        return self._run(session, self.tokenizer if previews else None, asked)

    def _run(self, session: Session, tokenizer: Tokenizer | None, asked: tuple[Any, ...]) -> Iterator[Event]:
        yield from stream(session, tokenizer, asked[1].to(self.device))
        self._sessions.give_back(session, *asked)

    def condition(self, labels: Sequence[int] | Condition) -> Condition:
        """What images are conditioned on, checked: class ids, or features of the shape that the generator reads.

        Raises:
            ValueError: when the generator takes the other kind, or other sizes.
        """
        wanted = self.generator.backbone.cond_shape
        if not isinstance(labels, Condition):
            if wanted is not None:
                raise ValueError("labels must be left out: this generator is conditioned on features of a text")
            return Condition(labels=torch.tensor(self.check_labels(labels)))
        if labels.cond is None or wanted is None:
            raise ValueError("features must be left out: this generator is conditioned on class labels")
        check_shape("features", labels.cond, "B S D", S=wanted[0], D=wanted[1])
        return labels

    def sample(
        self,
        labels: Sequence[int] | Condition,
        seed: int | Sequence[int] = 0,
        batch_size: int = 64,
        forced: Tensor | None = None,
        previews: bool = False,
        each: Sequence[Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> Samples:
        """Sample one image per label, in batches; the arguments are those of `stream`."""
        batches = self.sample_batches(labels, seed, batch_size, forced, previews, each, **settings)
        return Samples.joined(list(batches))

    def sample_batches(
        self,
        labels: Sequence[int] | Condition,
        seed: int | Sequence[int] = 0,
        batch_size: int = 64,
        forced: Tensor | None = None,
        previews: bool = False,
        each: Sequence[Mapping[str, Any]] | None = None,
        on_event: Callable[[Event, int], None] | None = None,
        **settings: Any,
    ) -> Iterator[Samples]:
        """Like `sample`, batch by batch; `on_event(event, batch size)` is called for every event."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        seeds = spread_seeds(seed, len(labels))
        for start in range(0, len(labels), batch_size):
            part = slice(start, start + batch_size)
            rows = None if forced is None else forced[part]
            own = None if each is None else each[part]
            shown: list[Tensor | None] = []
            for event in self.stream(labels[part], seeds[part], rows, previews, own, **settings):
                if event.kind == "preview":
                    shown.append(event.preview)
                if on_event is not None:
                    on_event(event, len(seeds[part]))
            told = [] if isinstance(labels, Condition) else list(labels[part])
            yield self._finish(event, shown, told, seeds[part], previews)

    def _finish(
        self, event: Event, shown: list[Tensor | None], labels: list[int], seeds: list[int], previews: bool
    ) -> Samples:
        if event.preview is not None:
            images = event.preview
        else:
            with torch.inference_mode():
                images = self.tokenizer.decode(
                    Tokens.of(self.tokenizer.spec, ids=event.ids), torch.tensor(seeds).to(self.device)
                )
        blank = torch.zeros_like(images)
        strip = torch.stack([blank if x is None else x for x in shown], dim=1).clamp(-1, 1) if previews else None
        return Samples(images.clamp(-1, 1), event.ids, labels, seeds, strip)

    def keep_prefix(self, images: Tensor, num_tokens: int, count: int) -> Tensor:
        """Forced tokens that keep the first tokens of reference images: layout control.

        Args:
            images: references, (R, C, H, W), cycled over the samples.
            num_tokens: how many tokens are kept, 0 to all.
            count: number of samples.

        Returns:
            (count, T), for the argument `forced`.
        """
        spec = self.tokenizer.spec
        if not 0 <= num_tokens <= spec.seq_len:
            raise ValueError(f"prefix_tokens must be 0 to {spec.seq_len}, got {num_tokens}")
        ids = self.tokenizer.encode(images.to(self.device)).ids
        assert ids is not None
        forced = ids[torch.arange(count) % len(ids)].clone()
        forced[:, num_tokens:] = FREE
        return forced

    def check_labels(self, labels: Sequence[int]) -> list[int]:
        """The labels, or a ValueError for the first that does not exist."""
        for label in labels:
            if not 0 <= label < self.num_classes:
                raise ValueError(f"labels must be 0 to {self.num_classes - 1}, got {label}")
        return list(labels)


def spread_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """Seed + i for image i, or the given seeds when there is one per image."""
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"seed must be one number or one per image, got {len(seeds)} for {count} images")
    for value in seeds:
        if not -(1 << 63) <= value < 1 << 63:
            raise ValueError(f"seeds must fit into 64 bits, got {value}")
    return seeds


def load(
    source: str | Path | SavedModel,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantize: str | None = None,
    compile: bool = False,  # noqa: A002 named as users name it
    cache_dtype: str | None = None,
    family: str | None = None,
    image_size: int | None = None,
    tokenizer: str | Path | None = None,
) -> Pipeline:
    """Open a model for sampling; `checkpoints.store.load_model` opens one that can be trained.

    Args:
        source: bundled name, model folder, training run, checkpoint file, published file of a known family, or a model
            on the Hugging Face Hub as `hf:owner/name[/file]`.
        device: where to.
        dtype: of the generator.
        quantize: see `Pipeline.prepare`.
        compile: let `torch.compile` take the step from token to token, where model and settings allow it. It takes half
            a minute before the first image and pays on a GPU.
        cache_dtype: see `Pipeline.prepare`.
        family: of a published file, where its names and shapes do not decide.
        image_size: in pixels, of a published file, where several look the same.
        tokenizer: file or folder of the tokenizer of a published generator.

    Raises:
        FileNotFoundError: when there is no such model.
        ValueError: when it is damaged, or only a tokenizer.
    """
    saved = source if isinstance(source, SavedModel) else open_model(source, family, image_size, tokenizer)
    if saved.generator is None:
        raise ValueError(f"model must have a generator, {saved.name} is only a tokenizer")
    described = saved.description
    pipe = Pipeline(
        saved.tokenizer, saved.generator, described.class_names, described.sampling, saved.name, saved.digest
    )
    return pipe.to(device, dtype).prepare(quantize, compile, cache_dtype)
