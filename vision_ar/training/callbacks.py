"""Callbacks: averaged weights, codebook usage, the saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch import Tensor

from vision_ar.checkpoints.store import save_model
from vision_ar.quantizers.vq import VectorQuantizer
from vision_ar.training.base import TrainingModule
from vision_ar.training.sharding import whole_tensors


class EMA(WeightAveraging):
    """Exponential moving average of the weights with warm-up; validation and export use the average.

    The decay of update n is min(decay, (1 + n) / (10 + n)): without the warm-up the average of a short run would be
    mostly its random start.

    Args:
        decay: of a long run.
        every_n_steps: optimiser steps between updates.
    """

    def __init__(self, decay: float = 0.999, every_n_steps: int = 1) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        super().__init__(avg_fn=self._average, use_buffers=False)
        self.decay, self.every_n_steps = decay, every_n_steps

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Update after every n-th optimiser step."""
        return step_idx is not None and (step_idx + 1) % self.every_n_steps == 0

    def _average(self, averaged: Tensor, current: Tensor, num_averaged: Tensor | int) -> Tensor:
        count = float(num_averaged)
        return averaged.lerp(current, 1 - min(self.decay, (1 + count) / (10 + count)))


class CodebookUsage(Callback):
    """Log the share of every codebook that occurred among the last tokens, as train/codebook_usage.

    Args:
        every_n_steps: between two logs; the count sorts 65,536 ids.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log it."""
        if trainer.global_step % self.every_n_steps:
            return
        for name, module in pl_module.named_modules():
            if isinstance(module, VectorQuantizer) and module.training and module.codebook.requires_grad:
                prefix = "" if name.count(".") <= 1 else f"_{name}"
                pl_module.log(f"train/codebook_usage{prefix}", module.usage(), prog_bar=True)


def log_folder(trainer: L.Trainer) -> Path:
    """Where a run writes; every process must ask, because the first one tells the others."""
    return Path(trainer.log_dir or trainer.default_root_dir)


class ExportModel(Callback):
    """Write the trained model as a folder, `<log folder>/model`, when training ends; the command line always adds it.

    Weights are those of the average when `EMA` runs. `sample.py --model` takes the folder or any folder above it.
    """

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write it, once, from the first process."""
        folder = log_folder(trainer) / "model"
        if trainer.fast_dev_run or not isinstance(pl_module, TrainingModule):  # type: ignore[attr-defined]
            return
        parts = {name: whole_tensors(part) for name, part in pl_module.parts().items()}  # every process has a share
        if trainer.is_global_zero:
            save_model(folder, pl_module.description(), parts, card(trainer, pl_module))


def card(trainer: L.Trainer, pl_module: TrainingModule) -> str:
    """Text of the saved model's README: what was trained, how long, and the last numbers."""
    named = pl_module.parts().items()
    sizes = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,} weights" for name, part in named)
    data = type(trainer.datamodule).__name__  # type: ignore[attr-defined]
    rows = [f"| {name} | {float(value):.4f} |" for name, value in sorted(trainer.callback_metrics.items())]
    lines = [
        "# Model card",
        "",
        f"Trained by `{type(pl_module).__name__}`: {sizes}.",
        f"Data: {data}, {trainer.global_step} optimiser steps, {trainer.current_epoch} whole epochs, "
        f"{trainer.world_size} x {trainer.strategy.root_device.type}, precision {trainer.precision}.",
        "",
        "| last value | |",
        "|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"
