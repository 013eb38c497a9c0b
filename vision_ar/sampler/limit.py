"""What a token costs at least: reading weights and cache once, at the bandwidth that the device shows."""

from __future__ import annotations

import time

import torch
from torch import nn

from vision_ar.generator import Generator
from vision_ar.layers.packed import InferenceLinear


def bandwidth(num_bytes: float, device: torch.device | str) -> float:
    """Bytes a second that reading so many of them reaches: the best of ten sums."""
    block, best = torch.ones(max(1, int(num_bytes) // 4), device=device), 0.0
    for _ in range(10):
        start = time.perf_counter()
        block.sum()
        wait(device)
        best = max(best, block.nbytes / (time.perf_counter() - start))
    return best


def wait(device: torch.device | str) -> None:
    """Until the device has done what it was told."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def weight_bytes(generator: Generator) -> int:
    """Bytes of weights that one token reads; tables of which it reads one row are left out."""
    total = 0
    for module in generator.modules():
        if isinstance(module, InferenceLinear):
            total += module.weight_bytes
        elif isinstance(module, nn.Linear):
            total += module.weight.nbytes
    return total


def token_seconds(generator: Generator, rows: int, cache_dtype: torch.dtype | None = None) -> float:
    """Seconds that a token of so many rows takes at least, with the cache half full as it is on average."""
    device = next(generator.parameters()).device
    weights = weight_bytes(generator)
    return (weights + rows * generator.backbone.new_cache(1, dtype=cache_dtype).full_bytes / 2) / bandwidth(
        weights, device
    )
