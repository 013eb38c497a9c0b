from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import seeded
from tests.golden import read_golden
from vision_ar.layers.rope import apply_rotary, rotary_table


def slow_angles(place: list[int], head_dim: int, base: float) -> list[float]:
    """Angle of every pair of one head at one place: first axis first, base**(-2i / part) within an axis."""
    part = head_dim // len(place)
    return [coordinate * base ** (-2 * i / part) for coordinate in place for i in range(part // 2)]


def slow_rotary(vector: list[float], place: list[int], base: float) -> list[float]:
    """One head at one place, pair by pair; a negative coordinate silences its part."""
    turned: list[float] = []
    pairs_per_axis = len(vector) // 2 // len(place)
    for pair, angle in enumerate(slow_angles(place, len(vector), base)):
        a, b = vector[2 * pair], vector[2 * pair + 1]
        heard = place[pair // pairs_per_axis] >= 0
        turned.append(heard * (a * math.cos(angle) - b * math.sin(angle)))
        turned.append(heard * (a * math.sin(angle) + b * math.cos(angle)))
    return turned


def places(axes: int) -> Tensor:
    return torch.tensor(list(itertools.product([0, 1, 7, -1, 300], repeat=axes)))[None]  # (1, T, A)


@pytest.mark.parametrize("base", [10000.0, 100.0])
@pytest.mark.parametrize(("axes", "head_dim"), [(1, 8), (2, 8), (2, 20), (3, 12)])
def test_rotation_equals_turning_every_pair_by_hand(axes: int, head_dim: int, base: float) -> None:
    positions = places(axes)
    x = torch.randn(2, 3, positions.shape[1], head_dim, generator=seeded(0))
    found = apply_rotary(x, rotary_table(positions, head_dim, base))
    expected = [
        [
            [slow_rotary(x[b, n, t].tolist(), place, base) for t, place in enumerate(positions[0].tolist())]
            for n in range(3)
        ]
        for b in range(2)
    ]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_the_table_has_one_row_of_angles_per_token_for_all_heads() -> None:
    cos, sin = rotary_table(places(2).expand(3, -1, -1), 8)
    assert cos.shape == sin.shape == (3, 1, 25, 4)
    assert cos.dtype == sin.dtype == torch.float32


@pytest.mark.parametrize(("name", "position"), [("dar_gpt_tiny", [6]), ("llamagen_gpt_tiny", [1, 1])])
def test_the_angles_are_those_of_published_models(shared_reference: Path, name: str, position: list[int]) -> None:
    row = torch.tensor(read_golden(shared_reference, name)["freqs_cis_row6"])  # token 5 of a 4 x 4 grid is at (1, 1)
    table = rotary_table(torch.tensor([[position]]), 16)
    torch.testing.assert_close(torch.stack(table, dim=-1)[0, 0, 0], row, rtol=0, atol=1e-6)


def test_position_zero_is_the_identity_and_a_negative_one_silences() -> None:
    x = torch.randn(1, 2, 2, 8, generator=seeded(1))
    turned = apply_rotary(x, rotary_table(torch.tensor([[[0], [-1]]]), 8))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    assert torch.equal(turned[:, :, 1], torch.zeros(1, 2, 8))


@pytest.mark.parametrize("axes", [1, 2])
def test_scores_depend_on_the_difference_of_places_only(axes: int) -> None:
    query, key = torch.randn(2, 1, 1, 1, 16, generator=seeded(2)).unbind()

    def score(query_place: Tensor, key_place: Tensor) -> Tensor:
        turned = [
            apply_rotary(x, rotary_table(p.view(1, 1, axes), 16)) for x, p in ((query, query_place), (key, key_place))
        ]
        return (turned[0] * turned[1]).sum()

    first, second = torch.tensor([9, 4][:axes]), torch.tensor([2, 6][:axes])
    torch.testing.assert_close(score(first, second), score(first + 50, second + 50), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(score(first, second), score(first + 1, second), rtol=1e-3)


def test_far_positions_keep_their_angle() -> None:
    cos, sin = rotary_table(torch.tensor([[[100_003]]]), 64)
    angles = torch.tensor(slow_angles([100_003], 64, 10000.0), dtype=torch.float64)
    torch.testing.assert_close(cos[0, 0, 0], angles.cos().float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[0, 0, 0], angles.sin().float(), rtol=0, atol=1e-6)


def test_rotation_is_done_in_float32_and_keeps_the_dtype() -> None:
    x = torch.randn(1, 1, 5, 8, generator=seeded(3)).bfloat16()
    table = rotary_table(torch.arange(5)[None, :, None], 8)
    turned = apply_rotary(x, table)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, apply_rotary(x.float(), table).bfloat16())


def test_no_table_leaves_the_input_alone() -> None:
    x = torch.randn(1, 1, 2, 4, generator=seeded(4))
    assert apply_rotary(x, None) is x


@pytest.mark.parametrize(("axes", "head_dim"), [(1, 7), (2, 6), (3, 8)])
def test_a_head_that_cannot_be_split_over_the_axes_is_refused(axes: int, head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim must be divisible by 2 x {axes} position axes, got {head_dim}"):
        rotary_table(torch.zeros(1, 1, axes, dtype=torch.int64), head_dim)
