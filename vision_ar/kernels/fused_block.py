"""A transformer block for one new token per row in six kernel launches: what a GPU does at small batches.

With few rows a block is bound by the bytes of its weights and by the number of launches, not by arithmetic. So the norm
is done while the weights stream by, queries are turned and keys and values go to their slots before they ever leave the
chip, and the second branch follows likewise. Each function has its plain counterpart, `reference_*`, which says what is
computed; `decode_attention` is the middle of the block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_ar.kernels.triton_found import HAS_TRITON
from vision_ar.layers.kv_cache import DeviceSlot
from vision_ar.layers.rope import apply_rotary

MOST_ROWS = 64
"""Rows that one program holds; with more of them a library's matrix product is the better choice."""
FEW_ROWS = 4
"""Up to here products are summed without tensor cores, which need 16 rows."""
PAIRS = 4
"""Pairs of outputs, or outputs, that one program makes from few rows: small, so that every core has work."""


Table = tuple[Tensor, Tensor] | None
"""Cosines and sines of every row, (R, E / 2) each, float32; None for no rotation."""


class Weights(NamedTuple):
    """A weight matrix and, where it has 8 bits, the scale of each output."""

    matrix: Tensor
    """(out, in)."""
    scales: Tensor | None = None
    """(out,), float32."""

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The matrix as numbers, (out, in)."""
        if self.scales is None:
            return self.matrix.to(dtype)
        return (self.matrix.float() * self.scales[:, None]).to(dtype)


def serves(x: Tensor) -> bool:
    """True when these kernels are the way to go for vectors (R, D): few rows on a GPU, outside the compiler."""
    return x.is_cuda and HAS_TRITON and len(x) <= MOST_ROWS and not torch.compiler.is_compiling()


def serves_heads(x: Tensor, head_dim: int) -> bool:
    """The same for `norm_qkv`, whose programs must not reach into the next head."""
    return serves(x) and head_dim % (2 * tile_of(x)["OUT"]) == 0


def norm_qkv(x: Tensor, gain: Tensor, eps: float, qkv: Weights, table: Table, slot: DeviceSlot) -> Tensor:
    """RMSNorm, queries, keys and values, rotation; keys and values go to their slots, queries (R, N, E) come back.

    Args:
        x: (R, D).
        gain: of the norm, (D,).
        eps: of the norm.
        qkv: ((N + 2 K) E, D), queries first.
        table: see `Table`.
        slot: where the new entry of every row goes in the cache of this layer.
    """
    from vision_ar.kernels.fused_block_triton import norm_qkv_kernel

    keys, values, lengths, _ = slot
    rows, width = x.shape
    kv, head_dim = keys.shape[1], keys.shape[3]
    heads = len(qkv.matrix) // head_dim - 2 * kv
    queries = x.new_empty(rows, heads, head_dim)
    cos, sin = table if table is not None else (lengths, lengths)
    tile = tile_of(x)
    norm_qkv_kernel[(len(qkv.matrix) // 2 // tile["OUT"],)](
        x, gain, qkv.matrix, scales_or(qkv), cos, sin, queries, keys, values, lengths,
        rows, width, eps, heads, kv, head_dim // 2, *keys.stride()[:3], *values.stride()[:3],
        ROTARY=table is not None, SCALED=qkv.scales is not None, **tile,
    )  # fmt: skip
    return queries


def linear(x: Tensor, weights: Weights, add: Tensor | None = None) -> Tensor:
    """x (R, D) times weights (O, D), plus `add` (R, O) where it is given."""
    from vision_ar.kernels.fused_block_triton import linear_kernel

    out, tile = x.new_empty(len(x), len(weights.matrix)), tile_of(x)
    linear_kernel[(-(-len(weights.matrix) // tile["OUT"]),)](
        x, weights.matrix, scales_or(weights), out if add is None else add, out, len(x), x.shape[1],
        len(weights.matrix), ADDS=add is not None, SCALED=weights.scales is not None, **tile,
    )  # fmt: skip
    return out


def norm_swiglu(x: Tensor, gain: Tensor, eps: float, gate_up: Weights) -> Tensor:
    """RMSNorm and the gated half of a SwiGLU, silu(gate y) * up y: (R, F) of x (R, D) and weights (2 F, D)."""
    from vision_ar.kernels.fused_block_triton import norm_swiglu_kernel

    hidden, tile = len(gate_up.matrix) // 2, tile_of(x)
    out = x.new_empty(len(x), hidden)
    norm_swiglu_kernel[(-(-hidden // tile["OUT"]),)](
        x, gain, gate_up.matrix, scales_or(gate_up), out, len(x), x.shape[1], hidden, eps,
        SCALED=gate_up.scales is not None, **tile,
    )  # fmt: skip
    return out


def tile_of(x: Tensor) -> dict[str, Any]:
    """Sizes of what one program holds for vectors (R, D): rows, outputs, inputs at a time."""
    rows = len(x)
    wide = x.dtype == torch.float32 or not x.is_cuda  # Triton's interpreter has no product of bfloat16
    if rows <= FEW_ROWS:
        padded = 1 << (rows - 1).bit_length()
        return {"ROWS": padded, "OUT": PAIRS, "IN": 1024 // padded, "FEW": True, "WIDE": wide}
    padded = max(16, 1 << (rows - 1).bit_length())
    return {"ROWS": padded, "OUT": 16, "IN": 64, "FEW": False, "WIDE": wide}


def scales_or(weights: Weights) -> Tensor:
    """The scales, or anything where there are none: a kernel takes a pointer."""
    return weights.matrix if weights.scales is None else weights.scales


def reference_norm_qkv(x: Tensor, gain: Tensor, eps: float, qkv: Weights, table: Table, slot: DeviceSlot) -> Tensor:
    """`norm_qkv`, plainly."""
    kv, head_dim = slot.keys.shape[1], slot.keys.shape[3]
    made = F.linear(F.rms_norm(x, x.shape[-1:], gain, eps), qkv.whole(x.dtype)).view(len(x), -1, 1, head_dim)
    turned, values = made.split([made.shape[1] - kv, kv], dim=1)
    turned = apply_rotary(turned, None if table is None else (table[0][:, None, None], table[1][:, None, None]))
    queries, keys = turned.split([turned.shape[1] - kv, kv], dim=1)
    slot.write(keys, values)
    return queries[:, :, 0]


def reference_linear(x: Tensor, weights: Weights, add: Tensor | None = None) -> Tensor:
    """`linear`, plainly."""
    made = F.linear(x, weights.whole(x.dtype))
    return made if add is None else made + add


def reference_norm_swiglu(x: Tensor, gain: Tensor, eps: float, gate_up: Weights) -> Tensor:
    """`norm_swiglu`, plainly."""
    gate, up = F.linear(F.rms_norm(x, x.shape[-1:], gain, eps), gate_up.whole(x.dtype)).chunk(2, dim=-1)
    return F.silu(gate) * up
