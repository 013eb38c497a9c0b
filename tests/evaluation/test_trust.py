"""The whole path from images to scores against torch-fidelity, and distances whose value is known beforehand."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.metric_fid import (
    fid_features_to_statistics,
    fid_statistics_to_metric,
)

from vision_ar.evaluation.extractors import Extractor, load_extractor
from vision_ar.evaluation.features import FeatureStore
from vision_ar.evaluation.frechet import RunningMoments, frechet_distance
from vision_ar.evaluation.image_files import open_images
from vision_ar.evaluation.scoring import score
from vision_ar.evaluation.statistics import load_statistics

torch.set_num_threads(1)

NAME = "inception-v3-compat"


class Images(Dataset):
    """Pixels as torch-fidelity takes them."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, number: int) -> Tensor:
        return self.pixels[number]


def pictures(count: int, seed: int, contrast: float) -> Tensor:
    """Coarse patterns with noise, (B, 3, 32, 32), uint8."""
    draws = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=draws).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    strength = contrast * torch.rand(count, 1, 1, 1, generator=draws)
    return (255 * (coarse + strength * torch.randn(count, 3, 32, 32, generator=draws)).clamp(0, 1)).to(torch.uint8)


def filled(folder: Path, pixels: Tensor, extractor: Extractor) -> FeatureStore:
    """Features of pixels that were saved as a file, two batches of unequal size."""
    path = folder.with_suffix(".npy")
    np.save(path, pixels.permute(0, 2, 3, 1).contiguous().numpy())
    store = FeatureStore(folder, open_images(path), extractor, batch_size=len(pixels) - 2)
    store.prepare()
    store.fill()
    return store


@dataclass
class Pair:
    """Two sets of images as features, and how torch-fidelity is called with the same images and weights."""

    samples: FeatureStore
    reference: FeatureStore
    theirs: dict[str, Any]
    expected: dict[str, float]
    """Scores by torch-fidelity, which keeps its features in a cache."""


@pytest.fixture(scope="module")
def pair(inception_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder, extractor = tmp_path_factory.mktemp("pair"), load_extractor("inception", inception_weights)
    samples, reference = pictures(12, seed=0, contrast=1.0), pictures(5, seed=1, contrast=0.2)
    theirs = {
        "input1": Images(samples), "input2": Images(reference), "input1_cache_name": "a", "input2_cache_name": "b",
        "cache_root": str(folder), "feature_extractor": NAME, "feature_layer_prc": "2048", "kid_subset_size": 5,
        "feature_extractor_weights_path": str(inception_weights),
        "cuda": False, "save_cpu_ram": True, "verbose": False,
    }  # fmt: skip
    return Pair(
        filled(folder / "samples", samples, extractor),
        filled(folder / "reference", reference, extractor),
        theirs,
        torch_fidelity.calculate_metrics(**theirs, isc=True, kid=True, prc=True),
    )


def test_scores_of_images_are_those_of_torch_fidelity(pair: Pair) -> None:
    found = score(pair.samples, pair.reference.statistics(), ("is", "kid", "precision_recall"))
    names = {
        "inception_score_std": "inception_score_std",
        "kid": "kernel_inception_distance_mean",
        "kid_std": "kernel_inception_distance_std",
        "precision": "precision",
        "recall": "recall",
    }
    assert set(found) == {"inception_score", *names}
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(pair.expected[theirs], rel=1e-3), ours
    excess = pair.expected["inception_score_mean"] - 1  # random weights are sure of little
    assert found["inception_score"] - 1 == pytest.approx(excess, rel=1e-3)
    assert excess > 1e-4 and found["kid"] > 0.01 and found["precision"] != found["recall"]


def test_moments_of_images_are_those_of_the_features_of_torch_fidelity(pair: Pair, tmp_path: Path) -> None:
    features = torch.load(Path(pair.theirs["cache_root"]) / f"a-{NAME}-features-2048.pt")
    torch.save(fid_features_to_statistics(features), tmp_path / "statistics.pt")
    expected, found = load_statistics(tmp_path / "statistics.pt").moments, pair.samples.moments()
    scale = float(expected.covariance.abs().max())
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.covariance, expected.covariance, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.slow  # the roots of 2048 x 2048 matrices, ours and theirs, take a quarter of a minute
def test_fid_of_images_is_that_of_torch_fidelity_also_against_its_cache(pair: Pair) -> None:
    expected = torch_fidelity.calculate_metrics(**pair.theirs, fid=True)["frechet_inception_distance"]
    cache = load_statistics(Path(pair.theirs["cache_root"]) / f"b-{NAME}-stat-fid-2048.pt")
    assert score(pair.samples, cache, ("fid",)) == {"fid": pytest.approx(expected, rel=1e-5, abs=1e-3)}
    assert expected > 1


def test_the_distance_of_classifier_features_is_the_fid_function_of_torch_fidelity_on_them(tmp_path: Path) -> None:
    extractor = load_extractor("cifar10")
    samples = filled(tmp_path / "a", pictures(40, seed=0, contrast=0.5), extractor)
    for count in (40, 250):  # fewer images than the 192 features, and more
        reference = filled(tmp_path / f"b{count}", pictures(count, seed=1, contrast=0.2), extractor)
        a, b = (fid_features_to_statistics(torch.from_numpy(np.array(s.features))) for s in (samples, reference))
        expected = fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]
        found = score(samples, reference.statistics(), ("fid",))
        assert found == {"fd-cifar10": pytest.approx(expected, abs=1e-3)}
        assert expected > 1


def test_images_compared_with_themselves_are_at_distance_zero(tmp_path: Path) -> None:
    store = filled(tmp_path / "a", pictures(30, seed=0, contrast=0.5), load_extractor("cifar10"))
    found = score(store, store.statistics(), ("fid", "precision_recall"))
    assert found["fd-cifar10"] == pytest.approx(0, abs=1e-9)
    assert (found["precision-cifar10"], found["recall-cifar10"]) == (1, 1)


def moments_of(features: Tensor, batch_size: int = 1000) -> RunningMoments:
    moments = RunningMoments(features.shape[1])
    for part in features.split(batch_size):
        moments.update(part)
    return moments


def normal(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_distances_of_growing_sets_converge_to_that_of_their_gaussians() -> None:
    turn = torch.linalg.qr(normal(4, 4, seed=5)).Q  # covariances with the same axes, none along a feature
    first, second = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), torch.tensor([2.0, 1.0, 0.5, 1.0]).double()
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0]).double()
    expected = float(shift.square().sum() + (first - second).square().sum())  # 5.25 + 6
    errors = []
    for count in (100, 400_000):
        a, b = normal(count, 4) * first @ turn, (normal(count, 4, seed=1) * second + shift) @ turn
        errors.append(abs(frechet_distance(moments_of(a, 50_000), moments_of(b, 50_000)) - expected))
    assert expected == 11.25
    assert errors[1] < 0.05 < errors[0]  # the deviation of the estimate is below 0.02 with 400,000 samples


def test_identical_sets_have_no_distance_and_permuted_sets_the_same() -> None:
    features, other = (3 * normal(500, 32) + 10).float(), (2 * normal(400, 32, seed=1) + 9).float()
    order = torch.randperm(500, generator=torch.Generator().manual_seed(2))
    moments, permuted = moments_of(features, 64), moments_of(features[order], 64)
    assert frechet_distance(moments, moments_of(features, 64)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(moments, permuted) == pytest.approx(0, abs=1e-9)
    distance = frechet_distance(moments, moments_of(other))
    assert frechet_distance(permuted, moments_of(other)) == pytest.approx(distance, rel=1e-9)
    assert distance > 32


def test_the_covariance_is_the_unbiased_one_of_numpy(tmp_path: Path) -> None:
    store = filled(tmp_path / "a", pictures(9, seed=0, contrast=0.5), load_extractor("cifar10"))
    features = np.asarray(store.features, np.float64)
    covariance = store.moments().covariance.numpy()
    np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-12)
    biased = np.cov(features, rowvar=False, bias=True)
    np.testing.assert_allclose(np.trace(covariance), np.trace(biased) * 9 / 8, rtol=1e-9)


def test_running_sums_in_float32_lose_a_covariance_that_float64_keeps() -> None:
    features = (normal(20_000, 8) @ torch.diag(torch.linspace(0.1, 1, 8).double()) + 1000).float()
    expected = np.cov(features.double().numpy(), rowvar=False)
    total, products = torch.zeros(8), torch.zeros(8, 8)
    for part in features.split(100):
        total, products = total + part.sum(dim=0), products + part.T @ part
    naive = (products - torch.outer(total, total) / len(features)) / (len(features) - 1)
    found = moments_of(features, 100)
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    assert np.abs((naive.numpy() - expected) / scale).max() > 0.5
    assert np.abs((found.covariance.numpy() - expected) / scale).max() < 1e-6
    np.testing.assert_allclose(found.mean.numpy(), features.double().mean(dim=0).numpy(), rtol=1e-12)


def test_parts_merged_in_any_order_and_grouping_have_the_moments_of_all() -> None:
    features = normal(200, 6) * 4 + 100
    parts = [moments_of(part) for part in features.split([1, 120, 9, 70])]
    whole = moments_of(features)
    for order in itertools.permutations(parts):
        one_by_one, left, right = RunningMoments(6), RunningMoments(6), RunningMoments(6)
        for part in order:
            one_by_one.merge(part)
        for side, share in ((left, order[:2]), (right, order[2:])):
            for part in share:
                side.merge(part)
        left.merge(right)
        for merged in (one_by_one, left):
            assert merged.count == whole.count == 200
            torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(merged.covariance, features.T.cov(), rtol=1e-9, atol=1e-9)
