"""Rotary position embedding over any number of position axes."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(positions: Tensor, head_dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `apply_rotary`.

    The head is split evenly over the A axes, first axis first; each part turns with frequencies base**(-2i / part).
    Position 0 is the identity. A negative position gives zeros, which silences the token's queries and keys
    (LlamaGen's condition prefix works that way).

    Args:
        positions: (B, T, A), integers.
        head_dim: width E of a head; must be divisible by 2 A.
        base: of the frequencies.

    Returns:
        Two tensors (B, 1, T, E / 2), float32.
    """
    axes = positions.shape[-1]
    if head_dim % (2 * axes):
        raise ValueError(f"head_dim must be divisible by 2 x {axes} position axes, got {head_dim}")
    part = head_dim // axes
    # float64: at position 4096 a float32 angle is already off by 2e-4
    exponents = torch.arange(0, part, 2, device=positions.device, dtype=torch.float64) / part
    angles = (positions[..., None].double() * base**-exponents).flatten(-2)  # (B, T, E / 2)
    heard = (positions >= 0).repeat_interleave(part // 2, dim=-1)
    return (angles.cos() * heard).float()[:, None], (angles.sin() * heard).float()[:, None]


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
    """Turn neighbouring pairs (2i, 2i + 1) of queries or keys (B, N, T, E), in float32; None leaves them alone."""
    if table is None:
        return x
    cos, sin = table
    if x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))  # one product in place of seven calls
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
