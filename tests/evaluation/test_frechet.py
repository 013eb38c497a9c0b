"""Fréchet distance against closed forms, and running moments against one pass over everything."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vision_ar.evaluation.frechet import RunningMoments, frechet_distance

torch.set_num_threads(1)


def moments_of(features: Tensor) -> RunningMoments:
    moments = RunningMoments(features.shape[1])
    moments.update(features)
    return moments


def normal(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(mean: Tensor, root: Tensor, seed: int = 0) -> RunningMoments:
    """Moments of a set whose mean and covariance, root root^T, are exact."""
    points = normal(50, root.shape[1], seed)
    points = points - points.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(points.T.cov()), points.T, upper=False)
    return moments_of((root @ white).T + mean)


def spread(*roots: float) -> Tensor:
    return torch.diag(torch.tensor(roots, dtype=torch.float64))


def test_distance_of_equal_spreads_is_the_squared_shift() -> None:
    shift = torch.tensor([3.0, 4.0], dtype=torch.float64)
    a, b = gaussian(torch.zeros_like(shift), spread(1, 2)), gaussian(shift, spread(1, 2), seed=1)
    assert frechet_distance(a, b) == pytest.approx(25, abs=1e-9)


def test_distance_of_axis_aligned_gaussians_is_the_squared_difference_of_deviations() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    a, b = gaussian(zero, spread(1, 2, 3)), gaussian(zero, spread(2, 2, 0.5), seed=1)
    assert frechet_distance(a, b) == pytest.approx(1 + 0 + 6.25, abs=1e-9)


def test_distance_of_covariances_that_do_not_commute_follows_the_formula_for_two_dimensions() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    first = torch.tensor([[1.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    second = torch.tensor([[3.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    a, b = first @ first.T, second @ second.T
    root_trace = math.sqrt((a @ b).trace() + 2 * math.sqrt((a @ b).det()))
    expected = float(a.trace() + b.trace()) - 2 * root_trace
    found = frechet_distance(gaussian(zero, first), gaussian(zero, second, seed=1))
    assert found == pytest.approx(expected, abs=1e-9)


def test_distance_of_flat_gaussians_is_exact_although_their_covariances_are_singular() -> None:
    a, b = normal(2, 40).tensor_split(2)
    first, second = (moments_of(torch.cat([line, -line])) for line in (a, b))  # covariance 2 line^T line, rank 1
    expected = 2 * float(a.square().sum() + b.square().sum() - 2 * (a @ b.T).abs())
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)


def test_a_set_has_no_distance_from_itself_in_any_order_even_with_fewer_samples_than_features() -> None:
    features = normal(20, 64)
    moments = moments_of(features)
    assert frechet_distance(moments, moments) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(moments, moments_of(features.flip(0))) == pytest.approx(0, abs=1e-10)


def test_distance_is_symmetric() -> None:
    a, b = moments_of(normal(100, 16)), moments_of(2 * normal(100, 16, seed=1) + 1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_merged_moments_are_those_of_the_joint_set() -> None:
    features = normal(90, 8) + 5
    joint, left, right = moments_of(features), moments_of(features[:20]), RunningMoments(8)
    for part in features[20:].split(16):
        right.update(part)
    left.merge(right)
    left.merge(RunningMoments(8))
    assert (left.count, right.count) == (90, 70)
    torch.testing.assert_close(left.mean, features.mean(dim=0))
    torch.testing.assert_close(left.covariance, features.T.cov())
    torch.testing.assert_close(joint.covariance, features.T.cov())


def test_a_large_offset_keeps_its_covariance_where_float32_sums_lose_it() -> None:
    offset, count = 2.0**13, 4096
    features = ((normal(count, 4) * 64).round() / 64 + offset).float()  # exact in float32
    expected = (features.double() - offset).T.cov()
    moments = RunningMoments(4)
    total, squares = torch.zeros(4), torch.zeros(4, 4)
    for part in features.split(64):
        moments.update(part)
        total, squares = total + part.sum(dim=0), squares + part.T @ part
    naive = (squares - torch.outer(total, total) / count) / (count - 1)
    torch.testing.assert_close(moments.covariance, expected, rtol=1e-9, atol=1e-9)
    assert (naive - expected).abs().max() > 0.1


def test_wrong_sizes_and_values_are_refused() -> None:
    with pytest.raises(ValueError, match="feature_dim must be at least 1, got 0"):
        RunningMoments(0)
    moments = RunningMoments(2)
    with pytest.raises(ValueError, match=r"features must have shape \(B, F=2\), got \(5, 3\)"):
        moments.update(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="at least 1 row"):
        moments.update(torch.zeros(0, 2))
    with pytest.raises(ValueError, match="features must be finite, got 2 values"):
        moments.update(torch.tensor([[1.0, math.nan], [math.inf, 0.0]]))
    with pytest.raises(ValueError, match="other must have feature_dim 2, got 3"):
        moments.merge(RunningMoments(3))
    with pytest.raises(ValueError, match="2 features of a, got 3"):
        frechet_distance(moments, RunningMoments(3))
    moments.update(torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="at least 2 samples, got 1"):
        frechet_distance(moments, moments)
