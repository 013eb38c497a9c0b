"""The Triton side of `keyed_draw`; apart, because importing it needs Triton."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

jit: Any = triton.jit  # untyped in Triton


@jit
def mix(bits):
    """The finaliser of SplitMix64."""
    bits = (bits ^ (bits >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    bits = (bits ^ (bits >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    return bits ^ (bits >> 31)


@jit
def best_of_part(
    logprobs, seeds, positions, scores, ids, vocab, parts, STREAM: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """The best id of one part of one row, and its score."""
    row, part = tl.program_id(0), tl.program_id(1)
    golden = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    number = part * PART + tl.arange(0, PART)
    key = mix(tl.load(seeds + row).to(tl.uint64) + golden * STREAM)
    key = mix(key + (tl.load(positions + row) + 1).to(tl.uint64) * golden)
    bits = mix(key + (number + 1).to(tl.uint64) * golden)
    uniform = (((bits >> 32).to(tl.float64) + 0.5) * 2.3283064365386963e-10).to(tl.float32)  # 2**-32
    uniform = tl.minimum(uniform, 0.999999940395355225)  # 1 - 2**-24
    noise = -tl.log(-tl.log(1.0 - uniform.to(tl.float64)))
    held = tl.load(logprobs + row.to(tl.int64) * vocab + number, mask=number < vocab, other=float("-inf"))
    score = held + noise.to(tl.float32)
    score = tl.where(number < vocab, score, float("-inf"))
    best, place = tl.max(score, axis=0, return_indices=True)
    tl.store(scores + row * parts + part, best)
    tl.store(ids + row * parts + part, (part * PART + place).to(tl.int64))
