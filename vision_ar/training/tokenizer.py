"""Lightning module that trains any tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vision_ar.evaluation.reconstruction import psnr
from vision_ar.interfaces import Tokenizer, TrainingPass
from vision_ar.layers.adversary import Adversary
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
        adversary: judges the reconstructions from its `start_step` on, and is trained beside the tokenizer; None is no
            adversary. With one, gradients are clipped by its `clip_norm` and not by the trainer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        optimizer: OptimizerCallable = partial(torch.optim.AdamW, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0),
        schedule: Schedule = Schedule(),  # noqa: B008 never changed
        init_from: str | None = None,
        frozen: Sequence[str] = (),
        seed: int = 0,
        adversary: Adversary | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.adversary, self.automatic_optimization = adversary, adversary is None
        self.tokenizer, self.optimizer, self.schedule, self.seed = tokenizer, optimizer, schedule, seed
        if init_from is not None:
            load_init(self, init_from)
        parts = dict(tokenizer.named_modules())
        for name in frozen:
            if name not in parts:
                raise ValueError(f"frozen must name parts of the tokenizer ({own_parts(tokenizer)}), got {name!r}")
            parts[name].requires_grad_(False)

    def trained(self) -> nn.Module:
        """The tokenizer; an adversary has its own optimiser."""
        return self.tokenizer

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """That of the tokenizer, and one for the adversary, which has no schedule."""
        own: Any = super().configure_optimizers()
        if self.adversary is None:
            return own
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError("precision must be 32-true or bf16-mixed with an adversary, got 16-mixed")
        lr = self.adversary.lr or own["optimizer"].defaults["lr"]
        return [own, {"optimizer": torch.optim.AdamW(self.adversary.parameters(), lr, (0.9, 0.95), weight_decay=0.05)}]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch of images."""
        images = batch["images"]
        found = self.tokenizer.training_pass(images, self.step_generator())
        losses = dict(found.losses)
        if self.adversary is not None:
            losses |= self._adversarial_step(self.adversary, images, found)
        self.log_losses("train", losses, len(images))
        return losses["loss"]

    def _adversarial_step(self, adversary: Adversary, images: Tensor, found: TrainingPass) -> dict[str, Tensor]:
        """First the tokenizer learns what the adversary thinks of it, then the adversary learns from both."""
        optimizer, judge_optimizer = cast(list[LightningOptimizer], self.optimizers())
        total, told = found.losses["loss"], {}
        judging = self.global_step >= adversary.start_step
        if judging:
            adversary.requires_grad_(False)
            judgement = adversary.judge(found.estimate)
            balance = adversary.balance(total, judgement, self.tokenizer.last_weight)
            total = total + adversary.weight * balance * judgement
            told = {"adversary": judgement.detach(), "balance": balance}
        self._update(optimizer, total, adversary.clip_norm)
        cast(LRScheduler, self.lr_schedulers()).step()
        if judging:
            adversary.requires_grad_(True)
            judged = adversary.losses(images, found.estimate)
            # without Lightning's wrapper: it would count as a step of the run, which ends and saves by its steps
            self._update(judge_optimizer.optimizer, judged["discriminator"], adversary.clip_norm)
            told |= {name: value.detach() for name, value in judged.items()}
        return told

    def _update(self, optimizer: Optimizer | LightningOptimizer, loss: Tensor, clip_norm: float) -> None:
        """One step of one optimiser; Lightning counts those of its own wrappers."""
        optimizer.zero_grad()
        self.manual_backward(loss)
        if clip_norm:
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(weights, clip_norm)
        optimizer.step()

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
