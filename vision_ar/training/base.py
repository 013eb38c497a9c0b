"""What both Lightning modules share: optimiser, schedule, repeatable draws, warm start, throughput."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from abc import ABC, abstractmethod
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from vision_ar.checkpoints.store import DESCRIPTION_KEY, Description, describe
from vision_ar.data.codes import tokenizer_hash
from vision_ar.data.images import ImageDataModule
from vision_ar.generator import Generator
from vision_ar.interfaces import Tokenizer
from vision_ar.training.schedules import Schedule
from vision_ar.training.sharding import shard

WEIGHT_DECAY_MIN_DIMS = 2  # biases, norms and gates are not decayed, as all published recipes have it


class TrainingModule(L.LightningModule, ABC):
    """Base of the two modules; holds no weights.

    Every draw of a training step (time, noise, dropout) is a function of (seed, rank, batch number), so that a resumed
    run continues exactly.
    """

    optimizer: OptimizerCallable
    schedule: Schedule
    seed: int
    _sharded = False

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainingModule:
        """Copy weights and settings, for averaging; share what leads to the trainer, whose locks cannot be copied."""
        for shared in (self._trainer, self.optimizer):
            memo[id(shared)] = shared
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser over the trainable parameters, matrices decayed, and the step-wise schedule."""
        trainable = [p for p in self.trained().parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.dim() >= WEIGHT_DECAY_MIN_DIMS]},
            {"params": [p for p in trainable if p.dim() < WEIGHT_DECAY_MIN_DIMS], "weight_decay": 0.0},
        ]
        optimizer = self.optimizer(groups)
        scheduler = self.schedule.attach(optimizer, self.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def trained(self) -> nn.Module:
        """What the optimiser moves."""
        return self

    def configure_model(self) -> None:
        """Shard what is trained, where the strategy asks for it."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self._sharded:
            mesh = self.device_mesh
            assert mesh is not None
            if (split := mesh["tensor_parallel"].size()) != 1:  # Lightning's default, which would train copies apart
                raise ValueError(f"tensor_parallel_size must be 1 and data_parallel_size all processes, got {split}")
            shard(self.trained(), mesh["data_parallel"])
            self._sharded = True  # Lightning calls this for every stage

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says, fused optimisers too: Lightning refuses those even where no scaler is involved."""
        plugin = self.trainer.precision_plugin
        if gradient_clip_val and isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def total_steps(self) -> int | None:
        """Optimiser steps of the whole run, None for a run that only time or the user ends."""
        steps = self.trainer.estimated_stepping_batches
        return None if math.isinf(steps) else int(steps)

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
        """Refuse cached codes that another tokenizer made, and more classes than the generator knows."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        generator = self.parts().get("generator")
        if isinstance(data, ImageDataModule) and isinstance(generator, Generator):
            known = generator.backbone.num_classes
            if 0 < known < data.num_classes:
                raise ValueError(f"backbone num_classes must be at least {data.num_classes} for this data, got {known}")
        if isinstance(data, ImageDataModule) and data.codes is not None:
            made_by = data.cached_codes("train").record.tokenizer
            tokenizer = self.parts()["tokenizer"]
            if made_by != (own := tokenizer_hash(cast(Tokenizer, tokenizer))):
                raise ValueError(f"codes must be those of this tokenizer ({own}), got {data.codes} made by {made_by}")

    def on_train_start(self) -> None:
        """Start the clock."""
        self._last_end: float | None = None

    def on_validation_end(self) -> None:
        """Stop the clock: the first step after a validation is not timed."""
        self._last_end = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed this step's dropout."""
        torch.manual_seed(self._step_seed(stream=0))

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the speed from the end of one step to the end of the next: data, step, averaging and logging."""
        now, before = time.perf_counter(), self._last_end
        self._last_end = now
        if before is not None:
            samples = len(batch["labels"]) * self.trainer.world_size
            self.log("train/samples_per_s", samples / max(now - before, 1e-9), prog_bar=True)

    def on_train_end(self) -> None:
        """Say how many images could not be read."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ImageDataModule) and (bad := len(data.bad_images)):
            rank_zero_warn(f"{bad} images could not be read; each was named above with its path")

    def step_generator(self) -> torch.Generator:
        """The generator of this step's draws."""
        return torch.Generator().manual_seed(self._step_seed(stream=1))

    @abstractmethod
    def evaluate(self, stage: str, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log how good the model is on a batch, under `stage`/."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Evaluate as val/."""
        self.evaluate("val", batch, batch_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Evaluate as test/."""
        self.evaluate("test", batch, batch_idx)

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
