import pytest

from vision_ar.training.schedules import Schedule


def test_warm_up_then_full_rate_then_decay_to_the_floor() -> None:
    share = Schedule("linear", warmup_steps=10, decay_from=0.5, floor=0.1).factor(100)
    assert share(0) == pytest.approx(0.1)
    assert share(9) == share(50) == 1
    assert share(75) == pytest.approx(0.1 + 0.9 * 0.5)
    assert share(100) == share(200) == pytest.approx(0.1)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    share = Schedule("cosine").factor(100)
    assert (share(0), share(50)) == (1, pytest.approx(0.5))
    assert share(100) == pytest.approx(0)


def test_constant_stays() -> None:
    assert {Schedule().factor(10)(step) for step in range(20)} == {1.0}


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="shape must be constant, linear or cosine, got 'step'"):
        Schedule("step")
    with pytest.raises(ValueError, match="decay_from must be in"):
        Schedule("linear", decay_from=2)
