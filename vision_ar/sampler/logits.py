"""The one law: from guided logits to log-probabilities, and the keyed draw from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vision_ar.kernels.keyed_draw import keyed_argmax
from vision_ar.kernels.triton_found import HAS_TRITON
from vision_ar.layers.noise import TOKEN_STREAM, keyed_gumbel

DRAWN_TOGETHER = 16384
"""Logits that are drawn from at a time on a CPU: what the hash works on must stay in the cache of a core."""


@dataclass(frozen=True)
class Law:
    """Turns logits into the log-probabilities that are drawn from; filters apply in the order of the arguments.

    Args:
        temperature: divides the logits; 0 puts all probability on the most likely token.
        top_k: keep the k most likely tokens (those that tie with the k-th stay too); None is off.
        top_p: keep the most likely tokens up to the first at which their sum reaches top_p; None is off.
        min_p: keep tokens at least min_p times as likely as the most likely one; None is off.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}; leave it out to turn it off")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value}; leave it out to turn it off")

    def __call__(self, logits: Tensor) -> Tensor:
        """Log-probabilities (..., V), float32, of logits (..., V); -inf marks removed tokens."""
        logits = logits.float()
        if self.temperature == 0:
            best = logits.argmax(dim=-1, keepdim=True)
            return torch.full_like(logits, -torch.inf).scatter_(-1, best, 0.0)
        # from the largest: dividing by a tiny temperature must not overflow
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            probs = logits.softmax(dim=-1)
            logits = logits.masked_fill(probs < self.min_p * probs.amax(dim=-1, keepdim=True), -torch.inf)
        return logits.log_softmax(dim=-1)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Remove all tokens after the first, in order of probability, at which the sum reaches `top_p`."""
    probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = probs.cumsum(dim=-1) - probs
    removed = (before >= top_p).scatter(-1, order, before >= top_p)
    return logits.masked_fill(removed, -torch.inf)


def draw(logprobs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draw one token per row from its law with keyed noise: argmax(log p + Gumbel), an exact draw.

    Args:
        logprobs: (Q, V), from a `Law`.
        seeds: sample seed of each row, (Q,), int64.
        positions: position of the token in its sample, (Q,), int64.

    Returns:
        Tokens (Q,), int64; a function of the row's law, seed and position alone.
    """
    compiling = torch.compiler.is_compiling()  # the compiler joins these calls itself
    if logprobs.is_cuda and HAS_TRITON and not compiling:
        return keyed_argmax(logprobs, seeds, positions, TOKEN_STREAM)
    if logprobs.device.type == "cpu" and not compiling:
        rows = max(1, DRAWN_TOGETHER // logprobs.shape[-1])
        parts = zip(logprobs.split(rows), seeds.split(rows), positions.split(rows), strict=True)
        return torch.cat([draw_some(*part) for part in parts])
    ids = torch.arange(logprobs.shape[-1], device=logprobs.device)
    return (logprobs + keyed_gumbel(seeds[:, None], positions[:, None], ids)).argmax(dim=-1)


def draw_some(logprobs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Draw a few rows on a CPU, with noise only for the tokens that survived the filters.

    Raises:
        ValueError: if a law has NaN.
    """
    kept = logprobs.isfinite()
    if bool(kept.all()):
        ids = torch.arange(logprobs.shape[-1])
        return keyed_gumbel(seeds[:, None], positions[:, None], ids).add_(logprobs).argmax(dim=-1)
    if logprobs.isnan().any():
        raise ValueError("logits must be finite, got NaN; use a smaller cfg_scale or another dtype")
    rows, ids = kept.nonzero(as_tuple=True)
    scores = torch.full_like(logprobs, -torch.inf)
    scores[rows, ids] = keyed_gumbel(seeds[rows], positions[rows], ids).add_(logprobs[rows, ids])
    return scores.argmax(dim=-1)
