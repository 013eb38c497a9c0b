"""Fréchet distance between two sets of features, from their running mean and covariance.

On the features of the bundled classifier the score is called `fd-cifar10`, never FID: that name belongs to Inception
features. The distance shrinks as samples are added, so compare scores of equally many samples only.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from vision_ar.shapes import check_shape


class Moments(Protocol):
    """Mean (F,) and unbiased covariance (F, F) of features, float64."""

    @property
    def mean(self) -> Tensor:
        """(F,)."""

    @property
    def covariance(self) -> Tensor:
        """(F, F)."""


class RunningMoments:
    """Mean and covariance of all features so far, in float64 on the CPU, one batch at a time.

    Args:
        feature_dim: number of features F, at least 1.

    Raises:
        ValueError: if `feature_dim` is below 1.

    Source:
        Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    def __init__(self, feature_dim: int) -> None:
        if feature_dim < 1:
            raise ValueError(f"feature_dim must be at least 1, got {feature_dim}")
        self.count = 0
        self.mean = torch.zeros(feature_dim, dtype=torch.float64)
        self.scatter = torch.zeros(feature_dim, feature_dim, dtype=torch.float64)
        """Sum of the outer products of the centred features, (F, F)."""

    @property
    def feature_dim(self) -> int:
        """Number of features F."""
        return len(self.mean)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance, (F, F), float64.

        Raises:
            RuntimeError: before the second sample.
        """
        if self.count < 2:
            raise RuntimeError(f"covariance needs at least 2 samples, got {self.count}; call update first")
        return self.scatter / (self.count - 1)

    def update(self, features: Tensor) -> None:
        """Add a batch.

        Args:
            features: (B, F), float, finite, B at least 1; no gradient is kept.

        Raises:
            ValueError: if the shape is another one, or a value is not finite.
        """
        check_shape("features", features, "B F", F=self.feature_dim)
        if not len(features):
            raise ValueError("features must have at least 1 row, got 0")
        if not features.isfinite().all():
            raise ValueError(f"features must be finite, got {(~features.isfinite()).sum()} values that are not")
        batch = RunningMoments(self.feature_dim)
        batch.count = len(features)
        values = features.detach().to("cpu", torch.float64)
        batch.mean = values.mean(dim=0)
        centred = values - batch.mean
        batch.scatter = centred.T @ centred
        self.merge(batch)

    def merge(self, other: RunningMoments) -> None:
        """Add all samples that `other` has seen; `other` stays as it is.

        Raises:
            ValueError: if `other` has another number of features.
        """
        if other.feature_dim != self.feature_dim:
            raise ValueError(f"other must have feature_dim {self.feature_dim}, got {other.feature_dim}")
        if other.count == 0:
            return
        total = self.count + other.count
        shift = other.mean - self.mean
        self.scatter = self.scatter + other.scatter + torch.outer(shift, shift) * (self.count * other.count / total)
        self.mean = self.mean + shift * (other.count / total)
        self.count = total


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared 2-Wasserstein distance of the Gaussians with these moments, at least 0.

    Args:
        a: of one set, at least 2 samples.
        b: of the other set, same number of features, at least 2 samples.

    Raises:
        ValueError: if the numbers of features differ.
        RuntimeError: if a set has fewer than 2 samples.

    Source:
        Dowson & Landau 1982, eq. 4; Heusel et al. 2017, section 3. The trace of the root of the product of two
        covariances is the sum of the singular values of the product of their roots, which, other than a matrix root
        of the product, stays exact when a covariance is singular.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"b must have the {len(a.mean)} features of a, got {len(b.mean)}")
    root_a, root_b = _root(a.covariance), _root(b.covariance)
    overlap = torch.linalg.svdvals(root_a.T @ root_b).sum()
    spread = root_a.square().sum() + root_b.square().sum() - 2 * overlap
    return max(0.0, float((a.mean - b.mean).square().sum() + spread))


def _root(covariance: Tensor) -> Tensor:
    """A matrix R with R R^T the covariance; eigenvalues that are only rounding errors become 0."""
    values, vectors = torch.linalg.eigh(covariance)
    floor = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    return vectors * values.where(values > floor, 0).sqrt()
