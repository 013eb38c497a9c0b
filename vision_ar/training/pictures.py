"""Pictures during training: reconstructions of a tokenizer, samples of a generator, and how both come about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from vision_ar.interfaces import Tokenizer
from vision_ar.pictures import columns_for, grid, to_pil, to_pixels
from vision_ar.pipeline import Pipeline
from vision_ar.training.callbacks import log_folder
from vision_ar.training.generator import GeneratorModule
from vision_ar.training.tokenizer import TokenizerModule


class Pictures(Callback):
    """After every validation, write pictures to `<log folder>/pictures` and to TensorBoard or Weights & Biases.

    A tokenizer shows originals and what is visible after each group; a generator shows samples and the same. List it
    before `EMA`, which puts the raw weights back when validation ends.

    Args:
        count: images shown.
        cfg_scale: guidance of the samples.
    """

    def __init__(self, count: int = 16, cfg_scale: float = 1.5) -> None:
        self.count, self.cfg_scale = count, cfg_scale
        self._images: Tensor | None = None

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep some images of the first batch; a batch of cached codes has none."""
        if batch_idx == 0 and "images" in batch:
            self._images = batch["images"][: self.count]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make and log the pictures; weights are the averaged ones when `EMA` comes later."""
        folder = log_folder(trainer) / "pictures"
        if trainer.sanity_checking or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        if isinstance(pl_module, TokenizerModule) and self._images is not None:
            strip = reconstruction_strip(pl_module.tokenizer, self._images)
            self._show(trainer, folder, "reconstructions", grid(strip.flatten(0, 1), strip.shape[1]))
        if isinstance(pl_module, GeneratorModule):
            self._show_samples(trainer, folder, pl_module)

    def _show_samples(self, trainer: L.Trainer, folder: Path, module: GeneratorModule) -> None:
        if module.generator.objective.steps(module.generator.spec) is None:
            return  # this objective learns to fill in, not to write
        pipe = Pipeline(module.tokenizer, module.generator, module.description().class_names)
        labels = [i % max(1, pipe.num_classes) for i in range(self.count)]
        samples = pipe.sample(labels, previews=True, cfg_scale=self.cfg_scale)
        assert samples.previews is not None
        self._show(trainer, folder, "samples", grid(samples.images, columns_for(self.count)))
        self._show(trainer, folder, "previews", grid(samples.previews.flatten(0, 1), samples.previews.shape[1]))

    def _show(self, trainer: L.Trainer, folder: Path, name: str, sheet: Tensor) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        to_pil(sheet).save(folder / f"{name}-{trainer.global_step:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, to_pixels(sheet), trainer.global_step)
            elif isinstance(logger, WandbLogger):
                logger.log_image(name, [to_pil(sheet)], trainer.global_step)


@torch.no_grad()
def reconstruction_strip(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """Originals and what is visible after each group, (B, 1 + groups, C, H, W)."""
    ids = tokenizer.encode(images).ids
    assert ids is not None
    preview = tokenizer.open_preview(len(images))
    shown = [preview.feed(part) for part in ids.split(list(tokenizer.spec.groups), dim=1)]
    frames = [images, *(torch.zeros_like(images) if frame is None else frame for frame in shown)]
    return torch.stack(frames, dim=1).clamp(-1, 1)
