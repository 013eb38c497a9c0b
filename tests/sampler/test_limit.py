"""The limit of the machine counts what a token reads."""

from __future__ import annotations

import pytest
import torch

from tests.sampler.test_engine import make_generator
from vision_ar.layers.packed import pack, packs
from vision_ar.sampler import limit


def test_the_weights_of_all_layers_count_and_tables_do_not() -> None:
    generator = make_generator()
    held = sum(value.nbytes for name, value in generator.named_parameters() if value.dim() == 2 and "table" not in name)
    assert limit.weight_bytes(generator) == held
    pack(generator, "int8")
    assert limit.weight_bytes(generator) == held // 4


@pytest.mark.skipif(not packs(torch.float32), reason="PyTorch was built without oneDNN")
def test_packed_weights_are_as_large() -> None:
    generator = make_generator()
    held = limit.weight_bytes(generator)
    pack(generator)
    assert limit.weight_bytes(generator) == held


def test_a_token_takes_what_weights_and_half_the_cache_take(monkeypatch) -> None:
    generator = make_generator()
    monkeypatch.setattr(limit, "bandwidth", lambda num_bytes, device: 1000.0)
    cache = 2 * 2 * 9 * 32 * 4  # keys and values, 2 blocks, prefix and 8 tokens, width 32, float32
    assert limit.token_seconds(generator, 6) == pytest.approx((limit.weight_bytes(generator) + 3 * cache) / 1000)


def test_bandwidth_is_that_of_bytes_really_read() -> None:
    assert 1e7 < limit.bandwidth(1 << 20, "cpu") < 1e13
