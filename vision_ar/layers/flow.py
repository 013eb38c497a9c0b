"""Flow matching with a shifted time and its two solvers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


def shift_time(raw: Tensor, shift: float) -> Tensor:
    """Shifted time u / (u + shift (1 - u)): spends more of [0, 1] near the noise for shift > 1."""
    return raw / (raw + shift * (1 - raw))


def group_at(raw: Tensor, num_groups: int) -> Tensor:
    """Which token group conditions raw time u in [0, 1): K u rounded half up, at most K - 1, int64.

    Source:
        D-AR code; the paper writes ceil(K t). The first group is drawn half as often, the last one 1.5 times.
    """
    return torch.floor(raw * num_groups + 0.5).long().clamp(max=num_groups - 1)


@dataclass
class FlowPath:
    """A solver's walk from noise (t = 0) to data (t = 1), one velocity at a time.

    Args:
        x: current state, starts as noise.
        times: shifted times of the steps, then 1.
        second_order: Adams-Bashforth of order two instead of Euler; with the constant-step weights 1.5 and -0.5
            although the steps are unequal, as in the D-AR code.
    """

    x: Tensor
    times: list[float]
    second_order: bool = True
    step: int = 0
    last_velocity: Tensor | None = field(default=None, repr=False)
    _slope: Tensor | None = field(default=None, repr=False)

    def advance(self, velocity: Tensor) -> None:
        """Take one step with the velocity at the current state and time."""
        slope = velocity
        if self.second_order and self.last_velocity is not None:
            slope = 1.5 * velocity - 0.5 * self.last_velocity
        self._slope, self._from, self._start = slope, self.x, self.times[self.step]
        self.x = self.x + (self.times[self.step + 1] - self.times[self.step]) * slope
        self.last_velocity = velocity
        self.step += 1

    def jump(self) -> Tensor:
        """Where the last step would end had it gone straight to t = 1: the preview."""
        if self._slope is None:
            raise RuntimeError("jump must come after advance, got a path without steps")
        return self._from + (1 - self._start) * self._slope
