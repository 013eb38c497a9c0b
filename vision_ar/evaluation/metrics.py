"""Metrics on features beyond the Fréchet distance, in memory that does not grow with the number of images.

Features may be memory-mapped arrays; they are read in blocks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK = 1000
NEIGHBOURS = 3
IS_SPLITS = 10
SHUFFLE_SEED = 2020  # torch-fidelity


def inception_score(
    logits: np.ndarray, splits: int = IS_SPLITS, shuffle_seed: int = SHUFFLE_SEED
) -> tuple[float, float]:
    """Mean and standard deviation, over the splits, of exp(mean KL(p(y|x) || p(y))).

    Args:
        logits: (N, K).
        splits: parts of the shuffled set, each with its own p(y).
        shuffle_seed: of the shuffle, as torch-fidelity does it, so that values are comparable.

    Raises:
        ValueError: if there are fewer images than splits.

    Source:
        Salimans et al. 2016, section 4. The mean KL is the mean negative entropy plus the entropy of the mean.
    """
    count = len(logits)
    if count < splits:
        raise ValueError(f"the score needs at least {splits} images, got {count}")
    order, scores = np.random.RandomState(shuffle_seed).permutation(count), []
    for split in range(splits):
        rows = order[split * count // splits : (split + 1) * count // splits]
        mean = torch.zeros(logits.shape[1], dtype=torch.float64)
        negative_entropy = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(rows), BLOCK):
            logprobs = torch.from_numpy(logits[rows[start : start + BLOCK]]).double().log_softmax(dim=1)
            mean += logprobs.exp().sum(dim=0)
            negative_entropy += (logprobs.exp() * logprobs).sum()
        mean /= len(rows)
        scores.append(float((negative_entropy / len(rows) - torch.xlogy(mean, mean).sum()).exp()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(samples: np.ndarray, reference: np.ndarray, subset_size: int = 1000) -> tuple[float, float]:
    """Mean and standard deviation of the squared maximum mean discrepancy over 100 subsets: KID on Inception features.

    Args:
        samples: features, (N, F).
        reference: features, (M, F).
        subset_size: features in a subset; no more than there are.

    Raises:
        ValueError: if a set has fewer than 2 images.

    Source:
        Binkowski et al. 2018, section 4, with the cubic kernel; torch-fidelity computes it.
    """
    from torch_fidelity import metric_kid  # takes seconds to import

    size = min(subset_size, len(samples), len(reference))
    if size < 2:
        raise ValueError(f"the kernel distance needs at least 2 images in both sets, got {size}")
    pair = (torch.from_numpy(np.asarray(samples)), torch.from_numpy(np.asarray(reference)))
    found = metric_kid.kid_features_to_metric(*pair, kid_subset_size=size, verbose=False)
    return found[metric_kid.KEY_METRIC_KID_MEAN], found[metric_kid.KEY_METRIC_KID_STD]


def precision_recall(samples: np.ndarray, reference: np.ndarray, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of samples near reference images, and share of reference images near samples.

    Near means: within the distance of some image of the other set to its third nearest neighbour there.

    Args:
        samples: features, (N, F).
        reference: features, (M, F).
        neighbours: whose distance is the radius.

    Raises:
        ValueError: if a set has too few images to have such neighbours.

    Source:
        Kynkäänniemi et al. 2019, eq. 1 and 2.
    """
    least = min(len(samples), len(reference))
    if least <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} images in both sets, got {least}")
    precision = covered(samples, reference, radii(reference, neighbours))
    return precision, covered(reference, samples, radii(samples, neighbours))


def radii(features: np.ndarray, neighbours: int) -> Tensor:
    """Distance of every row to its n-th nearest other row, (N,)."""
    found = []
    for rows in blocks(features):
        nearest = torch.full((len(rows), 0), torch.inf)
        for others in blocks(features):
            nearest = torch.cat([nearest, torch.cdist(rows, others)], dim=1)
            nearest = nearest.topk(min(neighbours + 1, nearest.shape[1]), largest=False).values  # itself is among them
        found.append(nearest[:, -1])
    return torch.cat(found)


def covered(points: np.ndarray, centres: np.ndarray, radius: Tensor) -> float:
    """Share of points within the radius, (M,), of some centre."""
    hits = 0
    for rows in blocks(points):
        inside = torch.zeros(len(rows), dtype=torch.bool)
        for others, limit in zip(blocks(centres), radius.split(BLOCK), strict=True):
            inside |= (torch.cdist(rows, others) <= limit).any(dim=1)
        hits += int(inside.sum())
    return hits / len(points)


def blocks(features: np.ndarray) -> list[Tensor]:
    """Views of the rows in blocks; a memory-mapped array is read only when a block is."""
    whole = torch.from_numpy(np.asarray(features))
    return list(whole.split(BLOCK))
