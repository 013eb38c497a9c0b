"""The block of few kernels against its plain counterpart, and a whole sampler on it against the plain sampler."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.conftest import seeded
from tests.kernels.interpreter import interpret, needs_triton
from tests.sampler.test_engine import LABELS, SEEDS, make_generator, plain_sample
from vision_ar.kernels import fused_block
from vision_ar.kernels.fused_block import MOST_ROWS, Weights
from vision_ar.layers.kv_cache import DeviceSlot
from vision_ar.layers.packed import QuantizedLinear, quantized
from vision_ar.sampler.engine import Condition, Session, stream
from vision_ar.sampler.guidance import constant
from vision_ar.sampler.logits import Law

WIDTH, HEADS, KV, HEAD_DIM, SLOTS, HIDDEN = 96, 4, 2, 32, 10, 72
EXACT, ROUNDED = {"rtol": 1e-5, "atol": 1e-5}, {"rtol": 2**-5, "atol": 2**-5}


def check_products(device: str) -> None:
    """All products for few and many rows, in two dtypes, with whole weights and weights of 8 bits."""
    check_case(1, torch.float32, None, device, rotary=False)
    check_case(2, torch.bfloat16, None, device)
    check_case(3, torch.float32, torch.int8, device)
    check_case(7, torch.float32, None, device)
    check_case(33, torch.bfloat16, torch.float8_e4m3fn, device)


def check_case(rows: int, dtype: torch.dtype, kind: torch.dtype | None, device: str, rotary: bool = True) -> None:
    """One case of `check_products`."""
    generator = seeded(rows)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def weights(outputs: int, inputs: int) -> Weights:
        matrix = drawn(outputs, inputs) * inputs**-0.5
        return Weights(matrix.to(dtype)) if kind is None else quantized(matrix, kind)

    close = EXACT if dtype == torch.float32 else ROUNDED
    x, gain = drawn(rows, WIDTH).to(dtype), (1 + 0.1 * drawn(WIDTH)).to(dtype)
    angles, lengths = drawn(rows, HEAD_DIM // 2), torch.randint(0, SLOTS, (rows,), generator=generator).to(device)
    table = (angles.cos(), angles.sin()) if rotary else None
    qkv, out = weights((HEADS + 2 * KV) * HEAD_DIM, WIDTH), weights(WIDTH, HEADS * HEAD_DIM)
    gate_up = weights(2 * HIDDEN, WIDTH)
    found, wanted = ([torch.zeros(rows, KV, SLOTS, HEAD_DIM, dtype=dtype, device=device) for _ in "kv"] for _ in "fw")
    queries = fused_block.norm_qkv(x, gain, 1e-5, qkv, table, DeviceSlot(*found, lengths, lengths + 1))
    torch.testing.assert_close(
        queries,
        fused_block.reference_norm_qkv(x, gain, 1e-5, qkv, table, DeviceSlot(*wanted, lengths, lengths + 1)),
        **close,
    )
    torch.testing.assert_close(found, wanted, **close)
    mixed = queries.flatten(1)
    for add in (None, x):
        expected = fused_block.reference_linear(mixed, out, add)
        torch.testing.assert_close(fused_block.linear(mixed, out, add), expected, **close)
    expected = fused_block.reference_norm_swiglu(x, gain, 1e-5, gate_up)
    torch.testing.assert_close(fused_block.norm_swiglu(x, gain, 1e-5, gate_up), expected, **close)


def check_sampler(device: str) -> None:
    """Variants of the backbone write the tokens of the plain sampler, with and without guidance."""
    grid: dict[str, Any] = {"rotary": "2d", "grid": (2, 4), "silent_prefix": True, "num_kv_heads": 1}
    variants = [(grid, constant(3.0))] if device == "cpu" else [({}, None), ({"rotary": "none"}, None), (grid, None)]
    per_program = 8 if device == "cpu" else fused_block.PAIRS  # an interpreter takes its time
    for settings, schedule in variants:
        generator, law = make_generator(**dict(settings)), Law(1.0, top_k=8)
        labels, seeds = LABELS[:2], SEEDS[:2]
        pairs = zip(labels, seeds, strict=True)
        expected = torch.stack([plain_sample(generator, int(c), int(s), law, schedule) for c, s in pairs])
        session = Session(generator.to(device), Condition(labels=labels), seeds, law, schedule, fixed=True)
        with (
            mock.patch.object(fused_block, "serves", lambda x: len(x) <= MOST_ROWS),
            mock.patch.object(fused_block, "PAIRS", per_program),
        ):
            assert generator.backbone.blocks[0].fused_serves(torch.zeros(4, 32, device=device))
            list(stream(session))
        assert torch.equal(session.ids.cpu(), expected)


@needs_triton
def test_the_kernels_equal_their_reference_in_the_interpreter() -> None:
    assert interpret("tests.kernels.test_fused_block", "check_products") == "equal"


@needs_triton
@pytest.mark.slow
def test_a_sampler_on_the_kernels_equals_the_plain_sampler_in_the_interpreter() -> None:
    assert interpret("tests.kernels.test_fused_block", "check_sampler") == "equal"


@pytest.mark.gpu
def test_the_kernels_equal_their_reference_on_a_gpu() -> None:
    check_products("cuda")
    check_sampler("cuda")


def test_they_serve_few_rows_on_a_gpu_only() -> None:
    assert not fused_block.serves(torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_8_bits_are_off_by_half_a_step_at_most(dtype: torch.dtype) -> None:
    linear = torch.nn.Linear(64, 8)
    with torch.no_grad():
        linear.weight[3] *= 100  # one output of large weights must not coarsen the others
        linear.weight[5] = 0
    held = QuantizedLinear(linear, dtype)
    found, largest = held.weights.whole(torch.float32), linear.weight.abs().amax(dim=1, keepdim=True)
    step = largest / 127 / 2 if dtype == torch.int8 else linear.weight.abs() / 16 + largest / 448 * 2**-10
    assert bool(((found - linear.weight).abs() <= 1.001 * step).all()) and not found[5].any()
    x = torch.randn(3, 64, generator=seeded(0))
    with torch.no_grad():
        torch.testing.assert_close(held(x), x @ found.T + linear.bias)
        torch.testing.assert_close(held(x, torch.ones(3, 8)), x @ found.T + linear.bias + 1)
    assert held.weight_bytes == 64 * 8
    with pytest.raises(RuntimeError, match="must not be saved"):
        held.state_dict()
