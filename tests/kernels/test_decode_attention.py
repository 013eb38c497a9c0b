"""Attention of one token: the reference against PyTorch, the Triton kernels against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.interpreter import interpret, needs_triton
from vision_ar.kernels.decode_attention import SPLIT, reference, split


def case(rows: int, heads: int, kv: int, slots: int, width: int, dtype=torch.float32, device="cpu") -> list[Tensor]:
    """Queries, keys, values and lengths, of which one is 1 and one all slots."""
    draws = torch.Generator().manual_seed(rows + slots)
    shapes = ((rows, heads, width), (rows, kv, slots, width), (rows, kv, slots, width))
    queries, keys, values = (torch.randn(shape, generator=draws).to(dtype) for shape in shapes)
    lengths = torch.randint(1, slots + 1, (rows,), generator=draws)
    lengths[0], lengths[-1] = 1, slots
    for row in range(rows):  # what lies behind the length must never be read
        keys[row, :, lengths[row] :] = values[row, :, lengths[row] :] = float("nan")
    return [tensor.to(device) for tensor in (queries, keys, values, lengths)]


SHAPES = [(2, 4, 4, 40, 64), (3, 4, 2, SPLIT, 48), (2, 2, 1, 2 * SPLIT + 1, 32), (3, 3, 3, SPLIT + 1, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_is_attention_over_what_each_row_has(shape) -> None:
    queries, keys, values, lengths = case(*shape)
    found = reference(queries, keys.nan_to_num(), values.nan_to_num(), lengths)
    shared = shape[1] // shape[2]
    for row, length in enumerate(lengths.tolist()):
        own = [x[row, :, :length].repeat_interleave(shared, dim=0) for x in (keys, values)]
        expected = F.scaled_dot_product_attention(queries[row, :, None], *own)[:, 0]
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-6)


def check_kernels(device: str) -> None:
    """The kernels against the reference, and with a cache that is a part of a larger one."""
    for shape in SHAPES:
        queries, keys, values, lengths = case(*shape, device=device)
        expected = reference(queries, keys.nan_to_num(), values.nan_to_num(), lengths)
        torch.testing.assert_close(split(queries, keys, values, lengths), expected, rtol=1e-5, atol=1e-5)
        layers = torch.stack([values, keys])[1]
        torch.testing.assert_close(split(queries, layers, values, lengths), expected, rtol=1e-5, atol=1e-5)
    queries, keys, values, lengths = case(*SHAPES[2], dtype=torch.bfloat16, device=device)
    expected = reference(queries.float(), keys.float().nan_to_num(), values.float().nan_to_num(), lengths)
    torch.testing.assert_close(split(queries, keys, values, lengths).float(), expected, rtol=2**-7, atol=2**-7)
    queries, keys, values, lengths = case(*SHAPES[1], device=device)  # a cache of 8 bits
    keys, values = (x.nan_to_num().to(torch.float8_e4m3fn) for x in (keys, values))
    expected = reference(queries, keys, values, lengths)
    torch.testing.assert_close(split(queries, keys, values, lengths), expected, rtol=1e-5, atol=1e-5)


@needs_triton
def test_the_kernels_equal_the_reference_in_the_interpreter() -> None:
    assert interpret("tests.kernels.test_decode_attention", "check_kernels") == "equal"


@pytest.mark.gpu
def test_the_kernels_equal_the_reference_on_a_gpu() -> None:
    check_kernels("cuda")
