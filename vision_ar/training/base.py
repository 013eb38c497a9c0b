"""What both Lightning modules share: optimiser, schedule, repeatable draws, warm start, throughput."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from vision_ar.checkpoints.store import DESCRIPTION_KEY, Description, describe
from vision_ar.data.codes import tokenizer_hash
from vision_ar.data.images import ImageDataModule
from vision_ar.generator import Generator
from vision_ar.interfaces import Tokenizer
from vision_ar.training.schedules import Schedule

WEIGHT_DECAY_MIN_DIMS = 2  # biases, norms and gates are not decayed, as all published recipes have it


class TrainingModule(L.LightningModule):
    """Base of the two modules; holds no weights.

    Every draw of a training step (time, noise, dropout) is a function of (seed, rank, batch number), so that a resumed
    run continues exactly.
    """

    optimizer: OptimizerCallable
    schedule: Schedule
    seed: int

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser over the trainable parameters, matrices decayed, and the step-wise schedule."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.dim() >= WEIGHT_DECAY_MIN_DIMS]},
            {"params": [p for p in trainable if p.dim() < WEIGHT_DECAY_MIN_DIMS], "weight_decay": 0.0},
        ]
        optimizer = self.optimizer(groups)
        scheduler = self.schedule.attach(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says, fused optimisers too: Lightning refuses those even where no scaler is involved."""
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        if gradient_clip_val and fused and self.trainer.precision != "16-mixed":
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def parts(self) -> dict[str, nn.Module]:
        """The modules that make up the saved model, by the names `checkpoints/store.py` knows."""
        names = ("tokenizer", "generator")
        return {name: part for name, part in self.named_children() if name in names}

    def description(self) -> Description:
        """What a saved model says of itself."""
        parts = self.parts()
        tokenizer, generator = parts["tokenizer"], parts.get("generator")
        described = Description(tokenizer=describe(cast(Tokenizer, tokenizer)))
        if isinstance(generator, Generator):
            described.backbone, described.objective = describe(generator.backbone), describe(generator.objective)
        data = self.trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]
        if isinstance(data, ImageDataModule):
            described.class_names = list(data.class_names)
        return described

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint say what it is, and hold nothing that needs code to be opened."""
        checkpoint[DESCRIPTION_KEY] = dataclasses.asdict(self.description())
        hyperparameters = checkpoint.get("hyper_parameters", {})  # from Python they may be modules and functions
        checkpoint["hyper_parameters"] = {name: v for name, v in hyperparameters.items() if is_plain(v)}

    def setup(self, stage: str) -> None:
        """Refuse cached codes that another tokenizer made."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ImageDataModule) and data.codes is not None:
            made_by = data.cached_codes("train").record.tokenizer
            tokenizer = self.parts()["tokenizer"]
            if made_by != (own := tokenizer_hash(cast(Tokenizer, tokenizer))):
                raise ValueError(f"codes must be those of this tokenizer ({own}), got {data.codes} made by {made_by}")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed this step's dropout."""
        torch.manual_seed(self._step_seed(stream=0))
        self._started = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the speed of the step itself; waiting for data is not in it."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        samples = len(batch["labels"]) * self.trainer.world_size
        self.log("train/samples_per_s", samples / seconds, prog_bar=True)

    def step_generator(self) -> torch.Generator:
        """The generator of this step's draws."""
        return torch.Generator().manual_seed(self._step_seed(stream=1))

    def log_losses(self, stage: str, losses: dict[str, Tensor], batch_size: int) -> None:
        """Log every named loss under `stage`/."""
        for name, value in losses.items():
            show = name == "loss"
            self.log(f"{stage}/{name}", value, prog_bar=show, batch_size=batch_size, sync_dist=stage != "train")

    def _step_seed(self, stream: int) -> int:
        number = self.trainer.fit_loop.total_batch_idx
        return hash((self.seed, self.global_rank, number, stream)) % (1 << 63)  # hash of ints is the same in every run


def is_plain(value: Any) -> bool:
    """True for numbers, texts, None and containers of them."""
    if isinstance(value, dict):
        return all(is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
