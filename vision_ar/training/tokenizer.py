"""Lightning module that trains any tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from vision_ar.evaluation.reconstruction import psnr
from vision_ar.interfaces import Tokenizer
from vision_ar.training.base import TrainingModule
from vision_ar.training.schedules import Schedule
from vision_ar.training.warm_start import load_init


class TokenizerModule(TrainingModule):
    """Train one tokenizer by the losses it names.

    Args:
        tokenizer: what is trained.
        optimizer: called with the parameter groups.
        schedule: of the learning rate.
        init_from: model folder, bundled name or checkpoint whose tokenizer weights the run starts from.
        frozen: parts of the tokenizer that stay as they are, for instance encoder and quantizer: then a longer training
            of the decoder leaves the tokens, and generators trained on them, valid.
        seed: of the draws in training.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        optimizer: OptimizerCallable = partial(torch.optim.AdamW, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0),
        schedule: Schedule = Schedule(),  # noqa: B008 never changed
        init_from: str | None = None,
        frozen: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tokenizer, self.optimizer, self.schedule, self.seed = tokenizer, optimizer, schedule, seed
        if init_from is not None:
            load_init(self, init_from)
        parts = dict(tokenizer.named_modules())
        for name in frozen:
            if name not in parts:
                raise ValueError(f"frozen must name parts of the tokenizer ({own_parts(tokenizer)}), got {name!r}")
            parts[name].requires_grad_(False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch of images."""
        losses = self.tokenizer.training_losses(batch["images"], self.step_generator())
        self.log_losses("train", losses, len(batch["images"]))
        return losses["loss"]

    def evaluate(self, stage: str, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Losses at draws that are the same every time, and the reconstruction error."""
        images = batch["images"]
        draws = torch.Generator().manual_seed(batch_idx)
        self.log_losses(stage, self.tokenizer.training_losses(images, draws), len(images))
        rebuilt = self.tokenizer.decode(self.tokenizer.encode(images))
        self.log(f"{stage}/psnr", psnr(rebuilt, images).mean(), prog_bar=True, batch_size=len(images), sync_dist=True)


def own_parts(tokenizer: Tokenizer) -> str:
    """Names of the parts that have weights, for messages."""
    return ", ".join(name for name, part in tokenizer.named_children() if any(True for _ in part.parameters()))
