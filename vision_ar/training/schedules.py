"""Step-wise learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass
class Schedule:
    """Linear warm-up, then the full rate, then a decay to the floor.

    Args:
        shape: of the decay: constant (none), linear or cosine.
        warmup_steps: optimiser steps from 0 to the full rate.
        decay_from: share of the steps after which the decay begins, in [0, 1].
        floor: last rate as a share of the full one.
        total_steps: optimiser steps in all; None takes the trainer's max_steps or max_epochs.
    """

    shape: str = "constant"
    warmup_steps: int = 0
    decay_from: float = 0.0
    floor: float = 0.0
    total_steps: int | None = None

    def __post_init__(self) -> None:
        if self.shape not in ("constant", "linear", "cosine"):
            raise ValueError(f"shape must be constant, linear or cosine, got {self.shape!r}")
        if not 0 <= self.decay_from <= 1:
            raise ValueError(f"decay_from must be in [0, 1], got {self.decay_from}")

    def factor(self, total_steps: int) -> Callable[[int], float]:
        """Share of the full rate as a function of the step."""
        start = max(self.warmup_steps, int(self.decay_from * total_steps))

        def share(step: int) -> float:
            warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
            if self.shape == "constant" or step < start:
                return warm
            done = min(1.0, (step - start) / max(1, total_steps - start))
            left = 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
            return warm * (self.floor + (1 - self.floor) * left)

        return share

    def attach(self, optimizer: Optimizer, total_steps: int | None) -> LambdaLR:
        """Build the scheduler of one optimiser; `total_steps` is None for a run without a last step."""
        steps = self.total_steps or total_steps
        if steps is None and self.shape != "constant":
            raise ValueError(f"schedule {self.shape} needs total_steps where the trainer has no last step, got None")
        return LambdaLR(optimizer, self.factor(steps or 0))
