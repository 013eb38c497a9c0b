"""Command-line options of everything that samples: guidance, filters, weights, device."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from vision_ar.layers.packed import QUANTIZE
from vision_ar.pipeline import CACHE_DTYPES
from vision_ar.sampler.guidance import SCHEDULES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_GRANT = Path("/sys/fs/cgroup/cpu.max")
SETTINGS = ("cfg_scale", "cfg_schedule", "cfg_start", "cfg_interval", "temperature", "top_k", "top_p", "min_p")


def add_sampling_options(p: argparse.ArgumentParser) -> None:
    """Add the options whose defaults are those of the model."""
    p.add_argument("--cfg-scale", type=float, help="guidance strength, 1 is off")
    p.add_argument("--cfg-schedule", choices=SCHEDULES, help="guidance strength over the tokens")
    p.add_argument("--cfg-start", type=float, help="strength at the first token, for linear and cosine (default 1)")
    p.add_argument("--cfg-interval", type=float, nargs=2, metavar=("BEGIN", "END"), help="for schedule interval")
    p.add_argument("--temperature", type=float, help="divides the logits; 0 is greedy")
    p.add_argument("--top-k", type=int, help="keep the k most likely tokens")
    p.add_argument("--top-p", type=float, help="keep the most likely tokens up to this probability")
    p.add_argument("--min-p", type=float, help="keep tokens at least this share as likely as the best")
    p.add_argument("--compile", action="store_true", help="let torch.compile take the step; pays on a GPU")
    p.add_argument("--cache-dtype", choices=CACHE_DTYPES, help="keys and values of 8 bits, on a GPU, for many images")


def add_weight_options(p: argparse.ArgumentParser) -> None:
    """Add the options that say how the weights of the generator are held."""
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the generator (default float32)")
    p.add_argument("--quantize", choices=QUANTIZE, help="weights of 8 bits, for few images at a time; float8 on a GPU")


def weight_options(given: argparse.Namespace) -> dict[str, Any]:
    """The same as `pipeline.load` takes them."""
    return {"dtype": DTYPES[given.dtype], "quantize": given.quantize}


def step_options(given: argparse.Namespace) -> dict[str, Any]:
    """How tokens are written, as `pipeline.load` takes it."""
    return {"compile": given.compile, "cache_dtype": given.cache_dtype}


def sampling_options(given: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as `pipeline.Settings` takes them."""
    options = {name: getattr(given, name) for name in SETTINGS if getattr(given, name) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def pick_device(name: str) -> str:
    """The device to use; auto takes a GPU when there is one. A CPU works with the cores that this process may use."""
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, dtype=torch.float64, device=name)  # the keyed noise is made in float64
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that this machine has, got {name}: {reason}") from error
    return name


def usable_cores() -> int:
    """Cores that this process may use at once: those it is bound to, at most what its container is granted.

    PyTorch does not look at the grant, and more threads than cores wait for each other at every layer.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_GRANT.read_text().split()
        return max(1, min(bound, int(quota) // int(period)))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return bound
