"""The draw in one kernel against the draw in many calls."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import seeded
from tests.kernels.interpreter import interpret, needs_triton
from vision_ar.kernels.keyed_draw import PART, keyed_argmax
from vision_ar.layers.noise import TOKEN_STREAM, keyed_gumbel


def check_draw(device: str) -> None:
    """Laws with removed tokens, parts that are not full, and seeds of every size."""
    for vocab in (3, PART, PART + 1, 5 * PART - 7):
        generator = seeded(vocab)
        logprobs = torch.randn(40, vocab, generator=generator).mul(2).log_softmax(dim=-1)
        logprobs[1, : vocab // 2] = -torch.inf
        logprobs[2] = -torch.inf
        logprobs[2, vocab - 1] = 0
        seeds = torch.randint(-(2**63), 2**63 - 1, (40,), generator=generator)
        positions = torch.randint(0, 4096, (40,), generator=generator)
        expected = (logprobs + keyed_gumbel(seeds[:, None], positions[:, None], torch.arange(vocab))).argmax(dim=-1)
        drawn = keyed_argmax(*(x.to(device) for x in (logprobs, seeds, positions)), TOKEN_STREAM)
        assert torch.equal(drawn.cpu(), expected) and int(drawn[2]) == vocab - 1


@needs_triton
def test_the_draw_equals_its_reference_in_the_interpreter() -> None:
    assert interpret("tests.kernels.test_keyed_draw", "check_draw") == "equal"


@pytest.mark.gpu
def test_the_draw_equals_its_reference_on_a_gpu() -> None:
    check_draw("cuda")
