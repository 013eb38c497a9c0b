"""The Triton side of `fused_block`; apart, because importing it needs Triton."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

jit: Any = triton.jit  # untyped in Triton


@jit
def product(
    x, gain, weight, scales, places, valid, rows, width, eps,
    NORMED: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
    FEW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Vectors (rows, width), RMS-normalised if NORMED, times the rows `places` of a weight: (ROWS, OUT), float32.

    The norm is one number per vector, so it is gathered on the way and divides the sums at the end.
    """
    row = tl.arange(0, ROWS)
    squares = tl.zeros((ROWS,), tl.float32)
    if FEW:
        total = tl.zeros((ROWS, OUT, IN), tl.float32)
    else:
        total = tl.zeros((ROWS, OUT), tl.float32)
    for start in range(0, width, IN):
        column = start + tl.arange(0, IN)
        inside = column < width
        here = (row < rows)[:, None] & inside[None, :]
        vectors = tl.load(x + row[:, None] * width + column[None, :], mask=here, other=0.0)
        there = valid[:, None] & inside[None, :]
        matrix = tl.load(weight + places.to(tl.int64)[:, None] * width + column[None, :], mask=there, other=0.0)
        if NORMED:
            wide = vectors.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            wide = wide * tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            vectors = wide.to(vectors.dtype)
        if FEW:
            total += vectors.to(tl.float32)[:, None, :] * matrix.to(tl.float32)[None, :, :]
        else:
            if WIDE:
                vectors, matrix = vectors.to(tl.float32), matrix.to(tl.float32)
            total = tl.dot(vectors, tl.trans(matrix.to(vectors.dtype)), total, input_precision="ieee")
    if FEW:
        summed = tl.sum(total, axis=2)
    else:
        summed = total
    if NORMED:
        summed = summed / tl.sqrt(squares / width + eps)[:, None]
    if SCALED:
        summed = summed * tl.load(scales + places, mask=valid, other=0.0)[None, :]
    return summed


@jit
def norm_qkv_kernel(
    x, gain, weight, scales, cos, sin, queries, keys, values, lengths, rows, width, eps, heads, kv, half,
    key_row, key_head, key_slot, value_row, value_head, value_slot,
    ROTARY: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
    FEW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """OUT neighbouring pairs of one head; heads are queries, then keys, then values."""
    pair = tl.program_id(0) * OUT + tl.arange(0, OUT)
    head = tl.program_id(0) * OUT // half
    valid = pair >= 0
    even = product(x, gain, weight, scales, 2 * pair, valid, rows, width, eps, True, SCALED, ROWS, OUT, IN, FEW, WIDE)
    odd = product(
        x, gain, weight, scales, 2 * pair + 1, valid, rows, width, eps, True, SCALED, ROWS, OUT, IN, FEW, WIDE
    )
    even, odd = even.to(x.dtype.element_ty).to(tl.float32), odd.to(x.dtype.element_ty).to(tl.float32)
    row = tl.arange(0, ROWS)
    inner = pair % half
    here = (row < rows)[:, None] & valid[None, :]
    if ROTARY:
        angle = row[:, None] * half + inner[None, :]
        cosine = tl.where(head < heads + kv, tl.load(cos + angle, mask=here, other=1.0), 1.0)
        sine = tl.where(head < heads + kv, tl.load(sin + angle, mask=here, other=0.0), 0.0)
        even, odd = even * cosine - odd * sine, even * sine + odd * cosine
    column = 2 * inner[None, :]
    if head < heads:
        query = queries + (row[:, None] * heads + head) * 2 * half + column
        tl.store(query, even.to(queries.dtype.element_ty), mask=here)
        tl.store(query + 1, odd.to(queries.dtype.element_ty), mask=here)
    else:
        slot = tl.load(lengths + row, mask=row < rows, other=0)[:, None]
        far = row.to(tl.int64)[:, None]
        if head < heads + kv:
            key = keys + far * key_row + (head - heads) * key_head + slot * key_slot + column
            tl.store(key, even.to(keys.dtype.element_ty), mask=here)
            tl.store(key + 1, odd.to(keys.dtype.element_ty), mask=here)
        else:
            value = values + far * value_row + (head - heads - kv) * value_head + slot * value_slot + column
            tl.store(value, even.to(values.dtype.element_ty), mask=here)
            tl.store(value + 1, odd.to(values.dtype.element_ty), mask=here)


@jit
def linear_kernel(
    x, weight, scales, add, out, rows, width, outputs,
    ADDS: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
    FEW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """OUT outputs of all rows, plus what is added."""
    place = tl.program_id(0) * OUT + tl.arange(0, OUT)
    valid = place < outputs
    made = product(x, x, weight, scales, place, valid, rows, width, 0.0, False, SCALED, ROWS, OUT, IN, FEW, WIDE)
    row = tl.arange(0, ROWS)
    here = (row < rows)[:, None] & valid[None, :]
    index = row[:, None] * outputs + place[None, :]
    if ADDS:
        made = made.to(out.dtype.element_ty).to(tl.float32)  # as two calls would round
        made += tl.load(add + index, mask=here, other=0.0).to(tl.float32)
    tl.store(out + index, made.to(out.dtype.element_ty), mask=here)


@jit
def norm_swiglu_kernel(
    x, gain, weight, scales, out, rows, width, outputs, eps,
    SCALED: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, FEW: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """OUT outputs of all rows: the gate is the first half of the weights."""
    place = tl.program_id(0) * OUT + tl.arange(0, OUT)
    valid = place < outputs
    gate = product(x, gain, weight, scales, place, valid, rows, width, eps, True, SCALED, ROWS, OUT, IN, FEW, WIDE)
    up = product(
        x, gain, weight, scales, outputs + place, valid, rows, width, eps, True, SCALED, ROWS, OUT, IN, FEW, WIDE
    )
    gate, up = gate.to(out.dtype.element_ty).to(tl.float32), up.to(out.dtype.element_ty).to(tl.float32)
    made = gate / (1 + tl.exp(-gate)) * up
    row = tl.arange(0, ROWS)
    here = (row < rows)[:, None] & valid[None, :]
    tl.store(out + row[:, None] * outputs + place[None, :], made.to(out.dtype.element_ty), mask=here)
