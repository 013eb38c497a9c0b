"""The progress bar of training: one bar over all optimiser steps, whatever the epochs are."""

from __future__ import annotations

import math
import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

QUIET_REFRESH = 50
"""Batches between two updates where the output is no terminal but a file."""


class StepProgress(TQDMProgressBar):
    """Count steps of the whole run: recipes give steps, and an epoch of a run without a last one has no number."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else QUIET_REFRESH)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What is logged for the bar, without the number of the log folder."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Open the bar, at the step where a resumed run goes on."""
        super().on_train_start(trainer, *_)
        steps, bar = trainer.estimated_stepping_batches, self.train_progress_bar
        bar.reset(total=None if math.isinf(steps) else int(steps))
        bar.n = bar.initial = bar.last_print_n = trainer.global_step
        bar.set_description("Training")

    def on_train_epoch_start(self, *_: Any) -> None:
        """Epochs do not show."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move to the step that was reached."""
        bar = self.train_progress_bar
        if trainer.global_step % self.refresh_rate == 0 or trainer.global_step == bar.total:
            bar.n = trainer.global_step
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_train_epoch_end(self, *_: Any) -> None:
        """Epochs do not show."""
