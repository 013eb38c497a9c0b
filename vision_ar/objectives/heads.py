"""Heads: from hidden vectors to losses and laws. Built by the generator from the objective's `heads`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vision_ar.interfaces import Draw, Head


class TokenHead(Head):
    """Logits over the vocabulary; starts at zero, so that the first law is uniform.

    Args:
        dim: width of the hidden vectors.
        vocab_size: number of ids V.
        label_smoothing: share of the target spread over all ids.
    """

    def __init__(self, dim: int, vocab_size: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.output = nn.Linear(dim, vocab_size, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) in float32."""
        return self.output(hidden).float()

    def sample(self, hidden: Tensor, draw: Draw) -> Tensor:
        """Ids (Q,) that the one law chooses."""
        return draw.choose(self(hidden))

    def loss(self, hidden: Tensor, target: Tensor, kind: str) -> Tensor:
        """Cross-entropy with ids (Q,) for ce and nll (never smoothed), with laws (Q, V) for soft_ce."""
        if kind not in ("ce", "soft_ce", "nll"):
            raise ValueError(f"loss of a TokenHead must be ce, soft_ce or nll, got {kind!r}")
        smoothing = 0.0 if kind == "nll" else self.label_smoothing
        return F.cross_entropy(self(hidden), target, reduction="none", label_smoothing=smoothing)
