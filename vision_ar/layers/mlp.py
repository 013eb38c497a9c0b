"""Gated feed-forward layer of Llama-style blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ar.layers.packed import add_linear

HIDDEN_MULTIPLE = 256  # Llama: the hidden width is rounded up to a multiple of this


def swiglu_width(dim: int, multiple: int = HIDDEN_MULTIPLE) -> int:
    """Hidden width of a SwiGLU with as many weights as a plain layer of width 4 `dim`."""
    width = int(2 * 4 * dim / 3)
    return multiple * -(-width // multiple)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), no biases; gate and up are one matrix, gate first.

    Args:
        dim: width in and out.
        hidden_dim: width between; by default as in Llama.

    Source:
        Shazeer 2020, arXiv 2002.05202.
    """

    def __init__(self, dim: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        hidden_dim = hidden_dim or swiglu_width(dim)
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """(..., D) to (..., D), plus `add` of that shape."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        hidden = F.silu(gate) * up if torch.is_grad_enabled() else F.silu(gate).mul_(up)
        return self.down(hidden) if add is None else add_linear(self.down, hidden, add)
