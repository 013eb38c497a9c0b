from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.conftest import seeded
from tests.golden import read_golden
from vision_ar.layers.flow import FlowPath, group_at, shift_time


def test_the_shifted_times_are_the_published_ones(shared_reference: Path) -> None:
    record = read_golden(shared_reference, "dar_tokenizer_tiny")
    times = [shift_time(i / 8, 2.0) for i in range(9)]
    assert times == pytest.approx(record["schedule_K8_beta2"], abs=1e-7)
    assert times == pytest.approx([0, 1 / 15, 1 / 7, 3 / 13, 1 / 3, 5 / 11, 3 / 5, 7 / 9, 1])
    shifted = shift_time(torch.tensor(record["train_u"]), 2.0)
    torch.testing.assert_close(shifted, torch.tensor(record["train_shifted_t"]))


@pytest.mark.parametrize("shift", [0.5, 1.0, 4.0])
def test_shifting_keeps_the_ends_and_the_order(shift: float) -> None:
    raw = torch.linspace(0, 1, 101, dtype=torch.float64)
    time = shift_time(raw, shift)
    assert float(time[0]) == 0 and float(time[-1]) == 1
    assert bool((time[1:] > time[:-1]).all())
    if shift == 1.0:
        torch.testing.assert_close(time, raw)


@pytest.mark.parametrize("num_groups", [1, 2, 8])
def test_the_group_is_the_time_rounded_half_up(num_groups: int) -> None:
    raw = torch.arange(0, 1, 1 / 256)
    expected = [min(math.floor(num_groups * u + 0.5), num_groups - 1) for u in raw.tolist()]
    assert group_at(raw, num_groups).tolist() == expected
    assert group_at(raw, num_groups).dtype == torch.int64


def test_group_frequencies_are_those_of_the_published_code() -> None:
    counts = torch.bincount(group_at((torch.arange(16_000) + 0.5) / 16_000, 8), minlength=8)
    assert (counts / 1000).tolist() == [1, 2, 2, 2, 2, 2, 2, 3]  # of 16


def test_the_groups_of_the_published_steps_are_one_after_the_other() -> None:
    assert group_at(torch.arange(8) / 8, 8).tolist() == list(range(8))


def test_times_next_to_one_stay_in_the_last_group() -> None:
    assert int(group_at(torch.tensor(1 - 2**-24), 8)) == 7


TIMES = [0.0, 0.1, 0.3, 0.6, 1.0]


@pytest.mark.parametrize("second_order", [False, True])
def test_steps_and_jumps_equal_a_plain_loop(second_order: bool) -> None:
    start, *velocities = torch.randn(5, 2, 3, generator=seeded(0)).unbind()
    path = FlowPath(start, TIMES, second_order)
    x, previous = start, None
    for i, velocity in enumerate(velocities):
        path.advance(velocity)
        slope = 1.5 * velocity - 0.5 * previous if second_order and previous is not None else velocity
        torch.testing.assert_close(path.jump(), x + (1 - TIMES[i]) * slope)
        x, previous = x + (TIMES[i + 1] - TIMES[i]) * slope, velocity
        torch.testing.assert_close(path.x, x)
        assert path.step == i + 1
    torch.testing.assert_close(path.jump(), path.x)  # the last step ends at 1 by itself


def test_the_second_order_weights_are_constant_although_the_steps_are_not() -> None:
    path = FlowPath(torch.zeros(1), [0.0, 0.1, 0.7, 1.0])
    for velocity in (1.0, 10.0, 100.0):
        path.advance(torch.tensor([velocity]))
    assert float(path.x) == pytest.approx(0.1 * 1 + 0.6 * (15 - 0.5) + 0.3 * (150 - 5))


@pytest.mark.parametrize("second_order", [False, True])
def test_a_constant_velocity_is_followed_exactly(second_order: bool) -> None:
    noise, data = torch.randn(2, 4, generator=seeded(1)).unbind()
    path = FlowPath(noise, TIMES, second_order)
    for _ in range(4):
        path.advance(data - noise)
        torch.testing.assert_close(path.jump(), data)
    torch.testing.assert_close(path.x, data)


def test_the_start_is_not_written_over() -> None:
    noise = torch.ones(3)
    FlowPath(noise, [0.0, 1.0]).advance(torch.ones(3))
    assert torch.equal(noise, torch.ones(3))


def test_a_path_without_steps_has_no_preview() -> None:
    with pytest.raises(RuntimeError, match="jump must come after advance, got a path without steps"):
        FlowPath(torch.zeros(1), [0.0, 1.0]).jump()
