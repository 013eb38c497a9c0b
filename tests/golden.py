"""Recorded outputs of published systems: weights follow from a fill rule, so that only outputs need to be stored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def read_golden(folder: Path, name: str) -> dict[str, Any]:
    """The record `golden_<name>.json`."""
    return json.loads((folder / f"golden_{name}.json").read_text(encoding="utf-8"))


def hashed(shape: tuple[int, ...], rank: int) -> np.ndarray:
    """Numbers in [-1, 1), float64, from a 32-bit hash of the flat index and of `rank`."""
    low = np.uint64(0xFFFFFFFF)
    offset = np.uint64((rank * 40503 + 12345) & 0xFFFFFFFF)
    bits = (np.arange(np.prod(shape), dtype=np.uint64) * np.uint64(2654435761) + offset) & low
    bits ^= bits >> np.uint64(16)
    bits = (bits * np.uint64(2246822519)) & low
    bits ^= bits >> np.uint64(13)
    bits = (bits * np.uint64(3266489917)) & low
    bits ^= bits >> np.uint64(16)
    return bits.astype(np.float64).reshape(shape) / 2**31 - 1


def hashed_input(shape: tuple[int, ...], rank: int, scale: float = 1.0) -> Tensor:
    """Input data of a record, float32."""
    return torch.tensor(hashed(shape, rank) * scale, dtype=torch.float32)


def fill(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights by the fill rule, float32.

    Args:
        names: all published names, for a tensor's rank is its place among them in ASCII order; the rule leaves out
            buffers that count codebook usage.
        shapes: published name and shape of the tensors that are wanted.
    """
    ranks = {name: rank for rank, name in enumerate(sorted(names))}
    return {name: filled(name, shape, ranks[name]) for name, shape in shapes.items()}


def filled(name: str, shape: tuple[int, ...], rank: int) -> Tensor:
    """One tensor of `fill`."""
    values = hashed(shape, rank)
    if len(shape) >= 2:
        values = values * np.sqrt(3) / np.sqrt(values.size / shape[0])
    elif "gate" in name:
        values = 0.5 + 0.1 * values
    elif name.endswith("weight"):
        values = 1 + 0.1 * values
    else:
        values = 0.02 * values
    return torch.tensor(values, dtype=torch.float32)
