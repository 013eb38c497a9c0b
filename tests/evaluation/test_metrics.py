"""Metrics on features against torch-fidelity, against loops that say what they mean, and against known answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from vision_ar.evaluation import metrics
from vision_ar.evaluation.metrics import inception_score, kernel_distance, precision_recall, radii

torch.set_num_threads(1)


def normal(count: int, dim: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return (np.random.RandomState(seed).randn(count, dim) + shift).astype(np.float32)


@pytest.fixture(params=[3, 7, 50, 1000])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows read together: as few as neighbours, a number that divides no set, a whole set, more than there are."""
    monkeypatch.setattr(metrics, "BLOCK", request.param)
    return request.param


def theirs(samples: np.ndarray, reference: np.ndarray, **settings: int) -> tuple[float, float]:
    found = prc_features_to_metric(torch.from_numpy(samples), torch.from_numpy(reference), verbose=False, **settings)
    return found["precision"], found["recall"]


def near_by_loops(points: np.ndarray, centres: np.ndarray, neighbours: int) -> float:
    """Share of points within reach of a centre, whose reach is its n-th smallest distance to another centre."""
    hits = 0
    for point in points.astype(np.float64):
        for place, centre in enumerate(centres.astype(np.float64)):
            others = [np.linalg.norm(other - centre) for k, other in enumerate(centres) if k != place]
            if np.linalg.norm(point - centre) <= sorted(others)[neighbours - 1]:
                hits += 1
                break
    return hits / len(points)


@pytest.mark.parametrize("count", [10, 50, 103])
def test_inception_score_is_that_of_torch_fidelity_whatever_the_blocks(block: int, count: int) -> None:
    logits = 3 * normal(count, 20)
    expected = isc_features_to_metric(torch.from_numpy(logits))
    mean, deviation = inception_score(logits)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-10)
    assert deviation == pytest.approx(expected["inception_score_std"], rel=1e-8, abs=1e-12)
    if count > 10:
        assert mean > 1.5 and deviation > 0.01  # the comparison is one of numbers that vary


def test_inception_score_follows_the_wanted_splits_and_shuffle() -> None:
    logits = 3 * normal(61, 8)
    for splits, seed in ((1, 0), (4, 2020), (4, 5)):
        expected = isc_features_to_metric(torch.from_numpy(logits), splits=splits, rng_seed=seed)
        assert inception_score(logits, splits, seed)[0] == pytest.approx(expected["inception_score_mean"], rel=1e-10)
    assert inception_score(logits, 4, 2020)[0] != pytest.approx(inception_score(logits, 4, 5)[0], rel=1e-6)


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_inception_score_of_sure_and_even_predictions_is_the_number_of_classes(block: int, classes: int) -> None:
    logits = np.tile(1000 * np.eye(classes, dtype=np.float32), (3, 1))
    assert inception_score(logits, splits=1) == (pytest.approx(classes, rel=1e-12), 0)


@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0], [1.0, -2.0, 5.0], [1000.0, 0.0, -1000.0]])
def test_inception_score_of_constant_predictions_is_one(row: list[float]) -> None:
    mean, deviation = inception_score(np.tile(np.array(row, np.float32), (57, 1)))
    assert (mean, deviation) == (pytest.approx(1, abs=1e-12), pytest.approx(0, abs=1e-12))


def test_inception_score_of_half_sure_predictions_follows_the_formula() -> None:
    logits = np.log(np.array([[0.75, 0.25], [0.25, 0.75]], np.float32)).repeat(10, axis=0)
    divergence = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    assert inception_score(logits, splits=1)[0] == pytest.approx(np.exp(divergence), rel=1e-6)


def test_inception_score_shuffles_images_that_are_sorted_by_class() -> None:
    logits = (1000 * np.eye(10, dtype=np.float32)).repeat(100, axis=0)
    assert inception_score(logits)[0] > 8  # every split would score 1 in the order of the file


def test_inception_score_of_fewer_images_than_splits_is_refused() -> None:
    with pytest.raises(ValueError, match="the score needs at least 10 images, got 9"):
        inception_score(normal(9, 4))
    with pytest.raises(ValueError, match="the score needs at least 3 images, got 2"):
        inception_score(normal(2, 4), splits=3)


@pytest.mark.parametrize(("counts", "size"), [((60, 80), 1000), ((80, 60), 25), ((50, 50), 50)])
def test_kernel_distance_is_that_of_torch_fidelity(counts: tuple[int, int], size: int) -> None:
    samples, reference = normal(counts[0], 16, shift=0.3), normal(counts[1], 16, seed=1)
    pair = (torch.from_numpy(samples), torch.from_numpy(reference))
    expected = kid_features_to_metric(*pair, kid_subset_size=min(size, *counts), verbose=False)
    mean, deviation = kernel_distance(samples, reference, size)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9, abs=1e-6)
    assert mean > 0.05


def test_kernel_distance_of_whole_sets_is_the_unbiased_estimate_of_the_cubic_kernel() -> None:
    samples, reference = normal(12, 5, shift=0.5), normal(12, 5, seed=1)

    def mean_kernel(a: np.ndarray, b: np.ndarray, skip_same: bool) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (skip_same and i == j)]
        return float(np.mean([(np.dot(a[i].astype(float), b[j].astype(float)) / 5 + 1) ** 3 for i, j in pairs]))

    expected = mean_kernel(samples, samples, True) + mean_kernel(reference, reference, True)
    expected -= 2 * mean_kernel(samples, reference, False)
    mean, deviation = kernel_distance(samples, reference)
    assert mean == pytest.approx(expected, rel=1e-4)
    assert deviation == pytest.approx(0, abs=1e-5)  # all subsets are the set


def test_kernel_distance_of_a_set_with_itself_is_the_little_below_zero_that_the_estimate_has_in_any_order() -> None:
    features = normal(300, 16)
    kernel = (features.astype(float) @ features.T / 16 + 1) ** 3
    own, others = np.trace(kernel) / 300, (kernel.sum() - np.trace(kernel)) / (300 * 299)
    expected = 2 * (others - own) / 300  # twice the mean over pairs, less twice the mean with the diagonal
    permuted = features[np.random.RandomState(3).permutation(300)]
    for other in (features, permuted):
        assert kernel_distance(features, other)[0] == pytest.approx(expected, rel=1e-4)
        assert abs(kernel_distance(features, other, 100)[0]) < 0.1
    assert kernel_distance(features, normal(300, 16, seed=1, shift=0.5), 100)[0] > 1


def test_kernel_distance_of_a_single_image_is_refused() -> None:
    for counts in ((1, 20), (20, 1)):
        with pytest.raises(ValueError, match="at least 2 images"):
            kernel_distance(normal(counts[0], 4), normal(counts[1], 4))


@pytest.mark.parametrize("counts", [(50, 64), (64, 50), (8, 101)])
def test_precision_and_recall_are_those_of_torch_fidelity_whatever_the_blocks(
    block: int, counts: tuple[int, int]
) -> None:
    samples, reference = normal(counts[0], 6, shift=0.9), 1.3 * normal(counts[1], 6, seed=1)
    found = precision_recall(samples, reference)
    assert found == pytest.approx(theirs(samples, reference), abs=1e-6)
    assert found[0] != found[1] and 0 < min(found) and max(found) < 1


@pytest.mark.parametrize("neighbours", [1, 2, 5])
def test_precision_and_recall_are_those_of_two_loops(monkeypatch: pytest.MonkeyPatch, neighbours: int) -> None:
    monkeypatch.setattr(metrics, "BLOCK", 4)
    samples, reference = normal(18, 3, shift=0.5), normal(25, 3, seed=1)
    found = precision_recall(samples, reference, neighbours)
    assert found[0] == pytest.approx(near_by_loops(samples, reference, neighbours))
    assert found[1] == pytest.approx(near_by_loops(reference, samples, neighbours))
    assert found == pytest.approx(theirs(samples, reference, prc_neighborhood=neighbours), abs=1e-6)


def test_samples_of_one_of_two_modes_are_precise_and_recall_half(block: int) -> None:
    modes = np.concatenate([normal(40, 4), normal(40, 4, seed=1, shift=50)])
    assert precision_recall(modes[:40], modes) == (1.0, 0.5)
    assert precision_recall(modes, modes[:40]) == (0.5, 1.0)


def test_samples_around_one_mode_and_nowhere_else_are_never_taken_for_recall() -> None:
    modes = np.concatenate([normal(500, 2), normal(500, 2, seed=1, shift=50)])
    precision, recall = precision_recall(normal(1000, 2, seed=2), modes)
    assert precision > 0.95 and 0.45 < recall <= 0.5


def test_identical_sets_have_full_precision_and_recall_in_any_order(block: int) -> None:
    features = normal(60, 8)
    assert precision_recall(features, features) == (1.0, 1.0)
    assert precision_recall(features[::-1].copy(), features) == (1.0, 1.0)
    assert precision_recall(features + 1000, features) == (0.0, 0.0)


def test_the_radius_is_the_distance_to_the_nth_nearest_other_row(block: int) -> None:
    features = np.array([[0.0], [1.0], [3.0], [7.0], [15.0]], np.float32)
    torch.testing.assert_close(radii(features, 1), torch.tensor([1.0, 1.0, 2.0, 4.0, 8.0]))
    torch.testing.assert_close(radii(features, 3), torch.tensor([7.0, 6.0, 4.0, 7.0, 14.0]))
    torch.testing.assert_close(radii(np.repeat(features, 2, axis=0), 1), torch.zeros(10))


def test_precision_of_fewer_images_than_neighbours_is_refused() -> None:
    for counts in ((3, 20), (20, 3)):
        with pytest.raises(ValueError, match="precision and recall need more than 3 images in both sets, got 3"):
            precision_recall(normal(counts[0], 4), normal(counts[1], 4))
    assert precision_recall(normal(4, 4), normal(4, 4)) == (1.0, 1.0)


def test_memory_mapped_arrays_give_what_arrays_in_memory_give(block: int, tmp_path: Path) -> None:
    samples, reference = normal(53, 12, shift=0.3), normal(61, 12, seed=1)
    mapped = []
    for name, features in (("samples", samples), ("reference", reference)):
        np.save(tmp_path / f"{name}.npy", features)
        mapped.append(np.load(tmp_path / f"{name}.npy", mmap_mode="c"))
    assert all(isinstance(array, np.memmap) for array in mapped)
    assert inception_score(mapped[0]) == inception_score(samples)
    assert kernel_distance(*mapped, subset_size=30) == kernel_distance(samples, reference, 30)
    assert precision_recall(*mapped) == precision_recall(samples, reference)
    np.testing.assert_array_equal(mapped[0], samples)
