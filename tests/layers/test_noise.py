"""Every statistical test below fails for an ideal hash with the probability it states; its seeds are fixed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vision_ar.layers import noise
from vision_ar.layers.noise import DECODER_STREAM, TOKEN_STREAM, keyed_bits, keyed_gumbel, keyed_normal

LOW = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
SEEDS = [0, 1, -1, 17, 2**63 - 1, -(2**63)]
EULER = 0.5772156649015329


def mix(z: int) -> int:
    """The output function of SplitMix64 in plain unbounded integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & LOW
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & LOW
    return z ^ (z >> 31)


def slow_bits(seed: int, position: int, index: int, stream: int) -> int:
    """SplitMix64 started from a mix of seed, stream and position, read at counter `index`; unsigned."""
    key = mix((seed + stream * GOLDEN) & LOW)
    key = mix((key + (position + 1) * GOLDEN) & LOW)
    return mix((key + (index + 1) * GOLDEN) & LOW)


def slow_uniform(bits32: int) -> float:
    return min((bits32 + 0.5) / 2**32, 1 - 2**-24)


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def every_key() -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int, int]]]:
    keys = [(seed, position, index) for seed in SEEDS for position in (0, 1, 255, 10**6) for index in (0, 1, 16383)]
    return *torch.tensor(keys).unbind(1), keys


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts.double() - expected).square() / expected).sum())


def test_the_reference_gives_the_published_first_numbers_of_splitmix64() -> None:
    state, found = 1234567, []
    for _ in range(3):
        state = (state + GOLDEN) & LOW
        found.append(mix(state))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("stream", [TOKEN_STREAM, DECODER_STREAM, 12345])
def test_the_bits_are_those_of_splitmix64(stream: int) -> None:
    seeds, positions, ids, keys = every_key()
    bits = keyed_bits(seeds, positions, ids, stream)
    assert bits.dtype == torch.int64
    assert bits.tolist() == [signed(slow_bits(*key, stream)) for key in keys]


@pytest.mark.parametrize("position", [0, 1, 300])
def test_a_plain_number_may_be_the_position(position: int) -> None:
    seeds, ids = torch.tensor([5, -7]), torch.arange(2)
    bits = keyed_bits(seeds, position, ids, TOKEN_STREAM)
    assert torch.equal(bits, keyed_bits(seeds, torch.tensor(position), ids, TOKEN_STREAM))


def test_keys_broadcast() -> None:
    seeds, positions, ids = torch.tensor([3, 4])[:, None, None], torch.arange(3)[:, None], torch.arange(5)
    bits = keyed_bits(seeds, positions, ids, TOKEN_STREAM)
    assert bits.shape == (2, 3, 5)
    assert int(bits[1, 2, 4]) == signed(slow_bits(4, 2, 4, TOKEN_STREAM))


def test_gumbel_noise_equals_the_formula_of_one_number() -> None:
    seeds, positions, ids, keys = every_key()
    expected = [-math.log(-math.log1p(-slow_uniform(slow_bits(*key, TOKEN_STREAM) >> 32))) for key in keys]
    found = keyed_gumbel(seeds, positions, ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_normal_noise_equals_box_muller_of_one_number() -> None:
    def one(seed: int, index: int) -> float:
        bits = slow_bits(seed, 0, index, DECODER_STREAM)
        radius = math.sqrt(-2 * math.log(slow_uniform(bits >> 32)))
        return radius * math.cos(2 * math.pi * slow_uniform(bits & 0xFFFFFFFF))

    expected = torch.tensor([[one(seed, index) for index in range(12)] for seed in SEEDS]).view(len(SEEDS), 3, 4)
    found = keyed_normal(torch.tensor(SEEDS), (3, 4))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gumbel_noise_has_the_moments_of_the_gumbel_law() -> None:
    # 200,000 draws; both bounds are 5 standard errors (the Gumbel kurtosis is 5.4): fails with probability 1e-6
    count = 200_000
    draws = keyed_gumbel(torch.tensor(1), torch.tensor(0), torch.arange(count)).double()
    variance = math.pi**2 / 6
    assert abs(float(draws.mean()) - EULER) < 5 * math.sqrt(variance / count)
    assert abs(float(draws.var()) - variance) < 5 * variance * math.sqrt((5.4 - 1) / count)


def test_the_argmax_of_law_and_gumbel_noise_follows_the_law() -> None:
    # 100,000 seeds over 10 tokens, one of them rare: chi-square, 9 degrees of freedom, fails with probability 1e-4
    probs = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.03, 0.0199, 0.0001], dtype=torch.float64)
    count = 100_000
    noise_of = keyed_gumbel(torch.arange(count)[:, None], torch.tensor(7), torch.arange(10))
    counts = torch.bincount((probs.log().float() + noise_of).argmax(dim=1), minlength=10)
    assert chi_square(counts, count * probs) < 33.72


NEIGHBOURS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "positions": lambda n: (bits_of(n, 0, 0), bits_of(n, 1, 0)),
    "seeds": lambda n: (bits_of(n, 3, 5), bits_of(n + 1, 3, 5)),
    "ids": lambda n: (bits_of(9, 2, n), bits_of(9, 2, n + 1)),
    "position and id swapped": lambda n: (bits_of(9, n, 4), bits_of(9, 4, n)),
    "seed and position swapped": lambda n: (bits_of(n, 4, 0), bits_of(4, n, 0)),
    "streams": lambda n: (bits_of(n, 0, 0), bits_of(n, 0, 0, DECODER_STREAM)),
    "upper and lower half": lambda n: (bits_of(n, 0, 0), bits_of(n, 0, 0) << 32),
}


def bits_of(seeds: Tensor | int, positions: Tensor | int, ids: Tensor | int, stream: int = TOKEN_STREAM) -> Tensor:
    return keyed_bits(*(torch.as_tensor(key) for key in (seeds, positions, ids)), stream)


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbouring_keys_give_independent_numbers(name: str) -> None:
    # the top four bits of both in a table of 16 x 16: chi-square, 255 degrees of freedom, each fails with 1e-4
    count = 100_000
    first, second = (((bits >> 60) & 15).flatten() for bits in NEIGHBOURS[name](torch.arange(100, 100 + count)))
    table = torch.bincount(16 * first + second, minlength=256)
    assert chi_square(table, torch.full((256,), count / 256, dtype=torch.float64)) < 347.65


def test_normal_noise_has_the_moments_of_the_normal_law() -> None:
    # 200,000 draws; the first four powers have variances 1, 2, 15 and 96; bounds of 5 standard errors: fails with 2e-6
    draws = keyed_normal(torch.arange(20), (10_000,)).double()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(draws.pow(power).mean()) - expected) < 5 * math.sqrt(variance / draws.numel())


def test_normal_noise_follows_the_normal_law_in_its_bins_and_tails() -> None:
    # 16 equally likely bins, 15 degrees of freedom: fails with probability 1e-4
    draws = keyed_normal(torch.arange(20, 30), (10_000,)).double().flatten()
    bins = (torch.special.ndtr(draws) * 16).long().clamp(max=15)
    counts = torch.bincount(bins, minlength=16)
    assert chi_square(counts, torch.full((16,), draws.numel() / 16, dtype=torch.float64)) < 44.26


def test_normal_noise_of_neighbouring_elements_and_seeds_is_uncorrelated() -> None:
    # correlations of 100,000 pairs, bounds of 5 standard errors: fails with probability 1e-6
    draws = keyed_normal(torch.arange(11), (10_000,)).double()
    assert abs(float((draws[1:] * draws[:-1]).mean())) < 5 / math.sqrt(100_000)
    assert abs(float((draws[:, 1:] * draws[:, :-1]).mean())) < 5 / math.sqrt(109_989)


def test_noise_does_not_depend_on_the_batch() -> None:
    seeds = torch.tensor([5, 6, 5])
    together = keyed_normal(seeds, (3, 4, 4))
    assert torch.equal(together[0], together[2]) and not torch.equal(together[0], together[1])
    assert torch.equal(together[1:2], keyed_normal(seeds[1:2], (3, 4, 4)))
    ids = torch.arange(50)
    rows = keyed_gumbel(seeds[:, None], torch.tensor([[2], [3], [4]]), ids)
    assert torch.equal(rows[1], keyed_gumbel(torch.tensor(6), torch.tensor(3), ids))


def test_no_generator_state_is_used_or_changed() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = keyed_normal(torch.tensor([1]), (8,)), keyed_gumbel(torch.tensor(1), torch.tensor(0), torch.arange(8))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    again = keyed_normal(torch.tensor([1]), (8,)), keyed_gumbel(torch.tensor(1), torch.tensor(0), torch.arange(8))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("bits", [0, -1, 1 << 32, 0xFFFFFFFF, -(2**63)])
def test_noise_of_extreme_bits_is_finite(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    monkeypatch.setattr(noise, "keyed_bits", lambda seeds, positions, ids, stream: torch.full((1, 1), bits))
    seeds = torch.zeros(1, dtype=torch.int64)
    assert keyed_gumbel(seeds, seeds, seeds).isfinite().all()
    normal = keyed_normal(seeds, (1,))
    assert normal.isfinite().all() and float(normal.abs()) < 7


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits() -> None:
    seeds, positions, ids, _ = every_key()
    there = keyed_bits(seeds.cuda(), positions.cuda(), ids.cuda(), TOKEN_STREAM)
    assert torch.equal(there.cpu(), keyed_bits(seeds, positions, ids, TOKEN_STREAM))
