"""Classifier-free guidance and its schedules over the sequence."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

CfgSchedule = Callable[[float], float]
"""From progress in [0, 1] (first to last token) to `cfg_scale`."""


def constant(cfg_scale: float) -> CfgSchedule:
    """The same scale for every token."""
    return lambda progress: cfg_scale


def linear(cfg_scale: float, start: float = 1.0) -> CfgSchedule:
    """From `start` at the first token straight to `cfg_scale` at the last (D-AR uses start 1.1)."""
    return lambda progress: start + (cfg_scale - start) * progress


def cosine(cfg_scale: float, start: float = 1.0) -> CfgSchedule:
    """From `start` to `cfg_scale` along half a cosine wave: slow at both ends."""
    return lambda progress: start + (cfg_scale - start) * (1 - math.cos(math.pi * progress)) / 2


def interval(cfg_scale: float, begin: float = 0.0, end: float = 1.0) -> CfgSchedule:
    """`cfg_scale` for progress in [begin, end], no guidance outside.

    Source:
        Kynkäänniemi et al. 2024, arXiv 2404.07724.
    """
    return lambda progress: cfg_scale if begin <= progress <= end else 1.0


SCHEDULES = ("constant", "linear", "cosine", "interval")


def cfg_schedule(name: str, cfg_scale: float, start: float = 1.0, begin: float = 0.0, end: float = 1.0) -> CfgSchedule:
    """Build a schedule by name, checked.

    Args:
        name: constant, linear, cosine or interval.
        cfg_scale: guidance strength; 1 is off.
        start: strength at the first token, for linear and cosine.
        begin: progress at which guidance sets in, for interval.
        end: progress at which it stops, for interval.
    """
    if not (cfg_scale >= 0 and start >= 0 and math.isfinite(cfg_scale) and math.isfinite(start)):
        raise ValueError(f"cfg_scale must be at least 0, got {min(cfg_scale, start)}; 1.0 turns guidance off")
    if name == "constant":
        return constant(cfg_scale)
    if name == "linear":
        return linear(cfg_scale, start)
    if name == "cosine":
        return cosine(cfg_scale, start)
    if name == "interval":
        if not 0 <= begin <= end <= 1:
            raise ValueError(f"the guidance interval must satisfy 0 <= begin <= end <= 1, got {begin} and {end}")
        return interval(cfg_scale, begin, end)
    raise ValueError(f"cfg_schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")


def guide_logits(cond: Tensor, uncond: Tensor, scales: Tensor) -> Tensor:
    """Push conditional logits away from the unconditional ones.

    Args:
        cond: logits given the condition, (Q, V), float.
        uncond: logits given the null condition, same shape.
        scales: cfg_scale of each row, (Q,); 1 returns `cond`.

    Source:
        Ho & Salimans 2022, eq. 6, with cfg_scale = w + 1.
    """
    # exactly `cond` where the scale is 1, so that guidance that is off costs no rounding
    return torch.where(scales[:, None] == 1, cond, uncond + scales[:, None] * (cond - uncond))
