"""The kernels become code of a GPU: Triton compiles them for one that need not be there."""

from __future__ import annotations

from typing import Any

import pytest

from vision_ar.kernels.triton_found import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vision_ar.kernels import decode_attention_triton, fused_block_triton, keyed_draw_triton

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {"lengths": "*i64", "seeds": "*i64", "positions": "*i64", "ids": "*i64"}
FLOATS = ("scale", "eps")
WHOLE = ("x", "gain", "add", "out", "queries")
"""Arguments that have the dtype of the vectors."""
FEW = {"ROWS": 2, "OUT": 4, "IN": 512, "FEW": True, "WIDE": False}
MANY = {"ROWS": 16, "OUT": 16, "IN": 64, "FEW": False, "WIDE": False}


def compiled(kernel: Any, pointers: set[str], cache: str, weight: str, **constants: Any) -> bool:
    """True when the kernel has code for the GPU; `cache` and `weight` are their dtypes."""
    signature = {}
    for name in kernel.arg_names:
        kind = "fp32" if name in FLOATS else "i32"
        if name in pointers:
            kind = {"keys": f"*{cache}", "values": f"*{cache}", "weight": f"*{weight}", **POINTERS}.get(name, "*fp32")
            kind = "*bf16" if name in WHOLE else kind
        signature[name] = "constexpr" if name in constants else kind
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return "cubin" in triton.compile(ASTSource(kernel, signature, places), target=HOPPER).asm


@pytest.mark.parametrize("cache", ["bf16", "fp8e4nv"])
@pytest.mark.parametrize("tile", [FEW, MANY], ids=["few", "many"])
def test_the_block(tile: dict[str, Any], cache: str) -> None:
    weight = "bf16" if cache == "bf16" else "i8"
    tile = {"SCALED": weight == "i8", **tile}
    shared = {"x", "gain", "weight", "scales", "out", "add", "cos", "sin", "queries", "keys", "values", "lengths"}
    assert compiled(fused_block_triton.norm_qkv_kernel, shared, cache, weight, ROTARY=True, **tile)
    assert compiled(fused_block_triton.linear_kernel, shared, cache, weight, ADDS=True, **tile)
    assert compiled(
        fused_block_triton.norm_swiglu_kernel, shared, cache, "fp8e4nv" if tile["SCALED"] else weight, **tile
    )


def test_attention_and_draw() -> None:
    attention = {"queries", "keys", "values", "lengths", "sums", "stats", "out"}
    for cache in ("bf16", "fp8e4nv"):
        assert compiled(decode_attention_triton.read_part, attention, cache, "", SPLIT=128, BLOCK=64, WIDTH=64)
    assert compiled(decode_attention_triton.join_parts, attention, "bf16", "", SPLIT=128, WIDTH=64)
    drawing = {"logprobs", "seeds", "positions", "scores", "ids"}
    assert compiled(keyed_draw_triton.best_of_part, drawing, "", "", STREAM=1, PART=1024)
