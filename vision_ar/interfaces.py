"""The contracts of the project: read this file first.

Everything is a sequence of tokens in a decoding order. A `Tokenizer` turns data into `Tokens`, an `Objective`
turns tokens into a `Plan` (what is read where, and what it should have said), a `Backbone` turns embeddings into
hidden vectors, a `Head` turns hidden vectors into a loss or into new tokens. `run` forms every loss there is.
This file imports only torch; the parts of the package meet here and nowhere else.

Axis letters: B batch, T tokens, S cached or condition tokens, V vocabulary, D width, A position axes, Q readouts.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

FREE = -1
"""Id of a token that is not known yet: to be predicted in `Tokens.ids`, free to choose in `forced` tokens."""


class Recorded:
    """Remembers the arguments its subclasses are built with, so that a saved model can name them.

    The arguments are in `init_args`; `checkpoints/store.py` writes them to `config.yaml`.
    """

    init_args: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" not in cls.__dict__:
            return
        build = cls.__init__

        @functools.wraps(build)
        def recording(self: Any, *args: Any, **named: Any) -> None:
            build(self, *args, **named)
            if type(self) is cls:
                bound = inspect.signature(build).bind(self, *args, **named)
                bound.apply_defaults()
                self.init_args = dict(list(bound.arguments.items())[1:])

        cls.__init__ = recording  # type: ignore[method-assign]


@dataclass(frozen=True)
class TokenSpec:
    """Sizes of one kind of token sequence; everything that needs a size reads it here.

    Args:
        seq_len: tokens in a sequence, at least 1.
        groups: sizes of the decoding groups in order, summing to `seq_len`; a preview exists after each.
        vocab_size: number of ids, None for continuous tokens.
        latent_dim: width of a continuous token, None for discrete tokens.
        grid: size along each spatial axis for tokens with places, None for a plain sequence.

    Raises:
        ValueError: if the sizes contradict each other.
    """

    seq_len: int
    groups: tuple[int, ...]
    vocab_size: int | None = None
    latent_dim: int | None = None
    grid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, got {self.seq_len}")
        if any(size < 1 for size in self.groups) or sum(self.groups) != self.seq_len:
            raise ValueError(f"groups must be positive and sum to seq_len={self.seq_len}, got {self.groups}")
        if self.vocab_size is None and self.latent_dim is None:
            raise ValueError("a TokenSpec must have vocab_size, latent_dim or both, got neither")
        if self.grid is not None and torch.Size(self.grid).numel() != self.seq_len:
            raise ValueError(f"grid must have seq_len={self.seq_len} places, got {self.grid}")

    @property
    def ends(self) -> tuple[int, ...]:
        """Number of tokens known after each group, the last one is `seq_len`."""
        return tuple(itertools.accumulate(self.groups))

    def group_of(self) -> Tensor:
        """Group of each token, (T,), int64."""
        return torch.tensor([group for group, size in enumerate(self.groups) for _ in range(size)])

    def positions(self) -> Tensor:
        """Coordinates of each token, (T, A), int64: the index for a sequence, row-major places for a grid."""
        if self.grid is None:
            return torch.arange(self.seq_len)[:, None]
        axes = [torch.arange(size) for size in self.grid]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


@dataclass
class Tokens:
    """A batch of token sequences and what they are conditioned on.

    Args:
        positions: coordinates of every token, (B, T, A), int64.
        group: decoding group of every token, (B, T), int64; -1 marks padding.
        ids: discrete tokens, (B, T), int64, or None; `FREE` marks a token that is hidden from the backbone.
        latents: continuous tokens, (B, T, C), or None. With both present their embeddings add.
        given: True for condition tokens, (B, T): never corrupted, never a target.
        labels: class ids, (B,), int64, or None for no class.
        cond: any other condition, (B, S, D), float, or None.
        cond_mask: True for real condition vectors, (B, S), or None when all are real.
    """

    positions: Tensor
    group: Tensor
    ids: Tensor | None = None
    latents: Tensor | None = None
    given: Tensor | None = None
    labels: Tensor | None = None
    cond: Tensor | None = None
    cond_mask: Tensor | None = None

    @classmethod
    def of(cls, spec: TokenSpec, ids: Tensor | None = None, latents: Tensor | None = None, **condition: Any) -> Tokens:
        """Lay a batch out as `spec` says; `condition` may hold labels, cond, cond_mask and given."""
        content = ids if ids is not None else latents
        if content is None:
            raise ValueError("Tokens.of needs ids or latents, got neither")
        shape = (content.shape[0], spec.seq_len)
        if content.shape[:2] != shape:
            raise ValueError(f"tokens must have shape (B, {spec.seq_len}), got {tuple(content.shape[:2])}")
        positions = spec.positions().to(content.device).expand(shape[0], -1, -1)
        group = spec.group_of().to(content.device).expand(shape)
        return cls(positions, group, ids, latents, **condition)

    @property
    def batch_size(self) -> int:
        """Number of rows, B."""
        return self.positions.shape[0]

    @property
    def seq_len(self) -> int:
        """Number of tokens, T."""
        return self.positions.shape[1]

    def columns(self, start: int, stop: int) -> Tokens:
        """The tokens from column `start` up to `stop`, with the whole condition."""
        cut: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[:, start:stop]
            for name in ("positions", "group", "ids", "latents", "given")
        }
        return replace(self, **cut)

    def is_target(self) -> Tensor:
        """True where a token may be predicted: neither given nor padding, (B, T)."""
        real = self.group >= 0
        return real if self.given is None else real & ~self.given

    def to(self, device: torch.device | str) -> Tokens:
        """The same batch on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class AttentionPattern:
    """Who may attend to whom, as data; `layers/attention.py` turns it into a kernel call.

    The condition prefix of a backbone comes before every token: tokens always see all of it, and it never sees them.

    Args:
        kind: causal (earlier tokens and itself), full (all), prefix (all of the first `prefix_len` tokens, causal
            after), block (all tokens of the same or an earlier group), visible (all tokens that `mask`, (B, T), marks)
            or explicit (`mask` (B, T, T), row attends to column).
        prefix_len: for prefix.
        group: group of each token, (B, T), for block.
        mask: True where attention is allowed, for visible and explicit.
    """

    kind: str = "causal"
    prefix_len: int = 0
    group: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        kinds = ("causal", "full", "prefix", "block", "visible", "explicit")
        if self.kind not in kinds:
            raise ValueError(f"attention kind must be one of {', '.join(kinds)}, got {self.kind!r}")
        if (self.kind == "block") != (self.group is not None):
            raise ValueError(f"group must be given exactly for kind 'block', got kind {self.kind!r}")
        if (self.kind in ("visible", "explicit")) != (self.mask is not None):
            raise ValueError(f"mask must be given exactly for kinds 'visible' and 'explicit', got kind {self.kind!r}")


class Cache(Protocol):
    """What a backbone asks of a key-value cache; `layers/kv_cache.py` has the classes."""

    full_bytes: int
    """What it takes when it is full."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stage new entries (B, N, T, E) of a layer and return all that may be read, (B, N, S, E) each."""

    def visible(self, new: int, staged_mask: Tensor | None = None) -> Tensor | None:
        """Mask (B, new, S) over what `append` will return: True may attend; None when everything may."""


@dataclass
class TrainingPass:
    """What a tokenizer says of a training batch.

    Args:
        losses: by name; `loss` is what to minimise, the others are for the log.
        estimate: the data as the tokenizer gives it back, with its gradient: what an adversary judges.
    """

    losses: dict[str, Tensor]
    estimate: Tensor


class Tokenizer(Recorded, nn.Module, ABC):
    """Turns data into tokens and back. Subclasses set `spec` and can be trained by `TokenizerModule`."""

    spec: TokenSpec

    @abstractmethod
    def encode(self, data: Tensor, labels: Tensor | None = None) -> Tokens:
        """Turn a batch of data into tokens; deterministic, no gradient needed."""

    @abstractmethod
    def decode(self, tokens: Tokens, seeds: Tensor | None = None) -> Tensor:
        """Turn whole sequences back into data.

        Args:
            tokens: as `encode` returns them.
            seeds: one seed per row for decoders that draw noise, (B,), int64; None means 0 for every row.
        """

    @abstractmethod
    def open_preview(self, batch_size: int, seeds: Tensor | None = None) -> Preview:
        """Start showing `batch_size` sequences that are still being written."""

    @abstractmethod
    def training_pass(self, data: Tensor, generator: torch.Generator | None = None) -> TrainingPass:
        """Named losses of one batch, and what it looks like afterwards."""

    def training_losses(self, data: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The losses alone."""
        return self.training_pass(data, generator).losses

    @property
    def last_weight(self) -> Tensor | None:
        """Weight of the last layer, where an adversary compares gradients; None when there is no such layer."""
        return None

    def token_makers(self) -> dict[str, Any]:
        """All that decides which tokens data gets, settings and weights by name: equal ones make the same tokens."""
        return {**self.init_args, **self.state_dict()}

    def drop_training_parts(self) -> None:
        """Remove weights and settings that only `training_losses` needs, before a model is published."""

    @classmethod
    @abstractmethod
    def tiny(cls) -> Tokenizer:
        """A smallest useful instance, for the contract tests."""


class ImageTokenizer(Tokenizer):
    """A tokenizer of square images, (B, channels, image_size, image_size), in [-1, 1]."""

    image_size: int
    channels: int


class Preview(ABC):
    """Decodes a growing sequence, one group at a time, doing only the work that the new group adds."""

    @abstractmethod
    def feed(self, ids: Tensor) -> Tensor | None:
        """Take the next group (B, group size) and return what can be shown now, or None when nothing can.

        Raises:
            RuntimeError: when all groups were fed already.
        """


@dataclass
class Readout:
    """One thing that a plan predicts.

    Args:
        at: row and column of each hidden vector that is read, (Q, 2); column -1 is the end of the condition prefix.
        of: row and column of each original token that is predicted, (Q, 2).
        target: what should be said, (Q, ...).
        head: name of the head that says it.
        loss: ce, soft_ce, nll, mse, diffusion, span_ce, pair or info_nce; nll is ce without smoothing of any kind.
        weight: of this readout in the sum.
    """

    at: Tensor
    of: Tensor
    target: Tensor
    head: str = "token"
    loss: str = "ce"
    weight: float = 1.0


@dataclass
class Plan:
    """What one training batch asks: inputs to read, who sees whom, and the readouts that are scored."""

    inputs: Tokens
    attention: AttentionPattern
    readouts: list[Readout] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """One step of sampling, in columns of the sequence.

    Args:
        feed: known columns that the backbone reads now for the first time, in this order.
        read: columns whose hidden vectors are used; -1 is the end of the condition prefix.
        fill: columns that get their token from them, same length as `read`.
        attention: among the columns fed together, causal or full.
        head: name of the head that writes them.
    """

    feed: tuple[int, ...]
    read: tuple[int, ...]
    fill: tuple[int, ...]
    attention: str = "causal"
    head: str = "token"


@dataclass(frozen=True)
class Draw:
    """What a head needs to know to write Q tokens; made by the sampler.

    Args:
        seeds: sample seed of each token, (Q,), int64: all noise is a function of seed and position.
        positions: place of each token in its sample, (Q,), int64.
        cfg_scales: guidance strength of each token, (Q,), or None when guidance is off. With guidance the hidden
            vectors are 2 Q, all with the condition and then all without.
        choose: the one law, for heads with logits: from logits (Q or 2 Q, V) to ids (Q,).
    """

    seeds: Tensor
    positions: Tensor
    cfg_scales: Tensor | None
    choose: Callable[[Tensor], Tensor]


class Objective(Recorded, ABC):
    """Says what is to be predicted from what. Holds no weights; its heads are built by the generator."""

    @abstractmethod
    def plan(self, tokens: Tokens, generator: torch.Generator | None = None, progress: float = 0.0) -> Plan:
        """Form the plan of one batch; `progress` is the share of training done, for schedules."""

    @abstractmethod
    def heads(self, dim: int, spec: TokenSpec) -> dict[str, Head]:
        """Build the heads that the readouts name, for hidden vectors of width `dim`."""

    def steps(self, spec: TokenSpec) -> Sequence[Step] | None:
        """The order in which a new sequence is written, or None when this objective cannot write one."""
        return None

    def likelihood(self, tokens: Tokens) -> Plan | None:
        """The plan whose readouts, all of loss nll, sum to -log p(targets | condition), or None when there is none."""
        return None

    @classmethod
    @abstractmethod
    def tiny(cls) -> Objective:
        """A smallest useful instance, for the contract tests."""


class Backbone(Recorded, nn.Module, ABC):
    """Reads tokens. Positions, masks and cache slots are arguments; nothing is inferred from earlier calls."""

    dim: int
    spec: TokenSpec
    prefix_len: int
    """Condition vectors before the first token, at least 1."""
    num_classes: int
    """Class ids it can be conditioned on, 0 when it takes none."""
    cond_shape: tuple[int, int] | None = None
    """Number and width of the features it is conditioned on, S and D; None when those are class labels or nothing."""
    fixed_step: bool = False
    """True when `read_one` is always the same program, so that it can be captured."""

    @abstractmethod
    def embed_condition(self, tokens: Tokens) -> Tensor:
        """Vectors of the condition prefix, (B, prefix_len, D)."""

    @abstractmethod
    def embed_tokens(self, tokens: Tokens) -> Tensor:
        """Vectors of the tokens, (B, T, D)."""

    def embed(self, tokens: Tokens) -> Tensor:
        """Condition prefix and tokens, (B, prefix_len + T, D)."""
        return torch.cat([self.embed_condition(tokens), self.embed_tokens(tokens)], dim=1)

    @abstractmethod
    def place(self, tokens: Tokens) -> Tensor:
        """Positions of prefix and tokens as `forward` wants them, (B, prefix_len + T, A)."""

    @abstractmethod
    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        attention: AttentionPattern,
        kv_cache: Cache | None = None,
        cond_mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden vectors, (B, T, D), normalised and ready for a head.

        Args:
            embeddings: from `embed`, or any part of it when a cache holds the rest, (B, T, D).
            positions: the matching part of `place`, (B, T, A).
            attention: the pattern over the tokens; with a cache, causal or explicit over the new tokens.
            kv_cache: where earlier keys and values are; new ones are staged there, the caller commits them.
            cond_mask: True for real condition vectors, (B, prefix_len).
        """

    def read_one(self, embeddings: Tensor, positions: Tensor, kv_cache: Cache) -> Tensor:
        """Hidden vectors (B, 1, D) of one new token of every row, staged in the cache; a causal step of `forward`."""
        return self(embeddings, positions, AttentionPattern(), kv_cache)

    @abstractmethod
    def with_null_rows(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """For guidance: the condition (labels, cond, cond_mask; any may be absent) with as many null rows after it."""

    @abstractmethod
    def new_cache(self, batch_size: int, max_seq_len: int | None = None, dtype: torch.dtype | None = None) -> Any:
        """An empty `Cache` for prefix and tokens, on the device of the weights and in their dtype if none is given."""

    @classmethod
    @abstractmethod
    def tiny(cls) -> Backbone:
        """A smallest useful instance, for the contract tests."""


class Head(nn.Module, ABC):
    """Turns hidden vectors into a loss or into a law over tokens."""

    @abstractmethod
    def loss(self, hidden: Tensor, target: Tensor, kind: str) -> Tensor:
        """Loss of each readout, (Q,), float32, for the loss name `kind`."""

    @abstractmethod
    def sample(self, hidden: Tensor, draw: Draw) -> Tensor:
        """New tokens from hidden vectors (Q or 2 Q, D): ids (Q,), or latents (Q, C)."""


def readout_losses(backbone: Backbone, heads: Mapping[str, Head], plan: Plan) -> Iterator[tuple[Readout, Tensor]]:
    """Read what a plan asks: every readout with the loss of each of its parts, (Q,), float32."""
    inputs = plan.inputs
    hidden = backbone(backbone.embed(inputs), backbone.place(inputs), plan.attention, cond_mask=inputs.cond_mask)
    for readout in plan.readouts:
        rows, columns = readout.at.unbind(-1)
        read = hidden[rows, columns + backbone.prefix_len]  # (Q, D)
        yield readout, heads[readout.head].loss(read, readout.target, readout.loss)


def run(backbone: Backbone, heads: Mapping[str, Head], plan: Plan) -> dict[str, Tensor]:
    """Form the loss of a plan: the only place where losses are summed.

    Returns:
        `loss`, the weighted sum of the means of all readouts, and the mean of each as `<head>_<loss>`.
    """
    losses: dict[str, Tensor] = {"loss": torch.zeros((), device=plan.inputs.group.device)}
    for readout, each in readout_losses(backbone, heads, plan):
        value = each.mean()
        name = f"{readout.head}_{readout.loss}"
        losses[name] = losses.get(name, 0) + value
        losses["loss"] = losses["loss"] + readout.weight * value
    return losses
