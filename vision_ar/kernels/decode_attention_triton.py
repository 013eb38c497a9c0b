"""The Triton side of `decode_attention`; apart, because importing it needs Triton."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

jit: Any = triton.jit  # untyped in Triton


@jit
def read_part(
    queries, keys, values, lengths, sums, stats, scale, heads, shared, width,
    key_row, key_head, key_slot, value_row, value_head, value_slot, parts,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Softmax over one part of one head: its weighted sum of values, its largest score and the sum of its weights."""
    head_of_row, part = tl.program_id(0), tl.program_id(1)
    row, head = head_of_row // heads, head_of_row % heads
    length = tl.load(lengths + row)
    start = part * SPLIT
    place = head_of_row * parts + part
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    if start < length:
        query = tl.load(queries + head_of_row * width + columns, mask=inside, other=0.0).to(tl.float32) * scale
        best = tl.full((), float("-inf"), tl.float32)
        total = tl.zeros((), tl.float32)
        summed = tl.zeros((WIDTH,), tl.float32)
        key_base = keys + row.to(tl.int64) * key_row + (head // shared) * key_head
        value_base = values + row.to(tl.int64) * value_row + (head // shared) * value_head
        for offset in range(0, SPLIT, BLOCK):
            slots = start + offset + tl.arange(0, BLOCK)
            filled = slots < length
            both = filled[:, None] & inside[None, :]
            key = tl.load(key_base + slots[:, None] * key_slot + columns[None, :], mask=both, other=0.0)
            scores = tl.sum(key.to(tl.float32) * query[None, :], axis=1)
            scores = tl.where(filled, scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, axis=0))
            # a block beyond the length has no score: nothing may be divided by its weight
            shrink = tl.where(best == float("-inf"), 0.0, tl.exp(best - higher))
            weights = tl.where(filled, tl.exp(scores - higher), 0.0)
            value = tl.load(value_base + slots[:, None] * value_slot + columns[None, :], mask=both, other=0.0)
            summed = summed * shrink + tl.sum(weights[:, None] * value.to(tl.float32), axis=0)
            total = total * shrink + tl.sum(weights, axis=0)
            best = higher
        tl.store(sums + place * width + columns, summed, mask=inside)
        tl.store(stats + place * 2, best)
        tl.store(stats + place * 2 + 1, total)


@jit
def join_parts(sums, stats, lengths, out, heads, width, parts, SPLIT: tl.constexpr, WIDTH: tl.constexpr):
    """Join the parts of one head of one row."""
    head_of_row = tl.program_id(0)
    length = tl.load(lengths + head_of_row // heads)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    best = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    summed = tl.zeros((WIDTH,), tl.float32)
    for part in range(0, (length + SPLIT - 1) // SPLIT):
        place = head_of_row * parts + part
        score, weight = tl.load(stats + place * 2), tl.load(stats + place * 2 + 1)
        higher = tl.maximum(best, score)
        shrink = tl.where(best == float("-inf"), 0.0, tl.exp(best - higher))
        grow = tl.exp(score - higher)
        summed = summed * shrink + grow * tl.load(sums + place * width + columns, mask=inside, other=0.0)
        total = total * shrink + grow * weight
        best = higher
    tl.store(out + head_of_row * width + columns, (summed / total).to(out.dtype.element_ty), mask=inside)
