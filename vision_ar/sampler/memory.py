"""What a batch needs and what the device has, so that a run that will not fit says so before it starts."""

from __future__ import annotations

from pathlib import Path

import torch

from vision_ar.generator import Generator

MEMINFO = Path("/proc/meminfo")
LOGIT_COPIES = 6
"""Arrays of float32 as large as the logits that guidance, law and noise hold at a time, at most."""
SHARE = 0.9
"""Of the free memory that one batch may take; tokenizer and images need the rest."""


def batch_bytes(generator: Generator, batch_size: int, guided: bool, cache_dtype: torch.dtype | None = None) -> int:
    """Keys, values and logits of a batch, in bytes.

    Args:
        generator: where it will be sampled.
        batch_size: images.
        guided: True when every image has a second row, without its condition.
        cache_dtype: of keys and values, None is that of the weights.
    """
    rows = batch_size * (2 if guided else 1)
    widest = max(len(step.read) for step in generator.objective.steps(generator.spec) or [])
    logits = rows * widest * (generator.spec.vocab_size or 0) * 4 * LOGIT_COPIES
    return rows * generator.backbone.new_cache(1, dtype=cache_dtype).full_bytes + logits


def free_bytes(device: torch.device) -> int | None:
    """What is free on a device, None where nothing says so."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )  # by PyTorch, for what comes next
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu" or not MEMINFO.is_file():
        return None
    lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None


def check_batch(generator: Generator, batch_size: int, guided: bool, cache_dtype: torch.dtype | None = None) -> str:
    """Say in a line what a batch needs.

    Raises:
        ValueError: if that is more than there is; the message has the batch size that would fit.
    """
    device = next(generator.parameters()).device
    needed, free = batch_bytes(generator, batch_size, guided, cache_dtype), free_bytes(device)
    if free is None:
        return f"{batch_size} images at a time need {amount(needed)} for keys, values and logits"
    if needed > SHARE * free:
        fits = int(SHARE * free) // batch_bytes(generator, 1, guided, cache_dtype)
        raise ValueError(
            f"batch_size must be at most {fits} here, got {batch_size}: it needs {amount(needed)} for keys, values and "
            f"logits, {device.type} has {amount(free)} free"
        )
    return f"{batch_size} images at a time need {amount(needed)} for keys, values and logits, {amount(free)} are free"


def amount(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
