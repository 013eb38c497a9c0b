"""Keyed noise: random numbers that are a pure function of (seed, stream, position, id), with no generator state.

The bits are those of SplitMix64 (Steele, Lea & Flood 2014) started from a mix of the first three keys and read at
counter `id`. Only wrapping 64-bit integer arithmetic is used, so that every device gives the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOKEN_STREAM = 1
"""Stream of the draws of discrete tokens."""
DECODER_STREAM = 2
"""Stream of the starting noise of decoders."""


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift: torch shifts int64 arithmetically."""
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """Mix the bits in place."""
    bits.bitwise_xor_(_shift_right(bits, 30)).mul_(_MIX_1)
    bits.bitwise_xor_(_shift_right(bits, 27)).mul_(_MIX_2)
    return bits.bitwise_xor_(_shift_right(bits, 31))


def keyed_bits(seeds: Tensor, positions: Tensor | int, ids: Tensor, stream: int) -> Tensor:
    """Hash keys to 64 random bits; the arguments broadcast.

    Args:
        seeds: sample seeds, int64.
        positions: index of the draw within its sample, int64.
        ids: index within the draw (token id, noise element), int64.
        stream: separates uses of the same seed.
    """
    key = _mix(seeds + _signed(stream * (_GOLDEN % 2**64) % 2**64))
    if isinstance(positions, int):
        key = _mix(key + _signed((positions + 1) * _GOLDEN % 2**64))
    else:
        key = _mix(key + (positions + 1) * _GOLDEN)
    return _mix(key + (ids + 1) * _GOLDEN)


def _uniform(bits32: Tensor) -> Tensor:
    """Open-interval uniforms from 32-bit integers; float32, fine-grained near 0, at most 1 - 2**-24."""
    return bits32.double().add_(0.5).mul_(2.0**-32).float().clamp_(max=1 - 2.0**-24)


def keyed_gumbel(seeds: Tensor, positions: Tensor | int, ids: Tensor) -> Tensor:
    """Standard Gumbel noise of tokens `ids` at `positions` of the samples `seeds`, float32; arguments broadcast.

    argmax over ids of (log p + noise) is an exact draw from p. Written as -log(-log1p(-u)), because u is
    fine-grained near 0: the winners of rare tokens are resolved to 2**-32.
    """
    u = _uniform(_shift_right(keyed_bits(seeds, positions, ids, TOKEN_STREAM), 32))
    return u.neg_().log1p_().neg_().log_().neg_()


def keyed_normal(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, (B, *shape), float32: one independent tensor per seed (B,), by Box-Muller."""
    ids = torch.arange(math.prod(shape), device=seeds.device)
    bits = keyed_bits(seeds[:, None], 0, ids, DECODER_STREAM)
    radius = torch.sqrt(-2 * torch.log(_uniform(_shift_right(bits, 32))))
    angle = (2 * math.pi) * _uniform(bits & 0xFFFFFFFF)
    return (radius * torch.cos(angle)).unflatten(1, shape)
