"""Scores of samples while a generator trains."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info

from vision_ar.data.images import ImageDataModule
from vision_ar.evaluation.extractors import Extractor, load_extractor
from vision_ar.evaluation.frechet import RunningMoments, frechet_distance
from vision_ar.evaluation.protocols import labels_for, round_pixels
from vision_ar.evaluation.references import DataPixels
from vision_ar.evaluation.scoring import class_accuracy, score_name
from vision_ar.generator import Generator
from vision_ar.pipeline import Pipeline
from vision_ar.training.generator import GeneratorModule


class ScoreSamples(Callback):
    """After validations, log the Fréchet distance of samples to the validation images, and their class accuracy.

    The scores are of few samples: compare them within a run only. With `EMA` both weights are scored, the averaged ones
    under names that end with `_ema`.

    Args:
        num_samples: samples of each kind of weights.
        extractor: inception, or an in-domain one.
        cfg_scale: guidance of the samples.
        every_n_validations: validations between scores.
        batch_size: samples at a time.
        weights: Inception weights.
    """

    def __init__(
        self,
        num_samples: int = 2000,
        extractor: str = "cifar10",
        cfg_scale: float = 1.5,
        every_n_validations: int = 1,
        batch_size: int = 100,
        weights: str | None = None,
    ) -> None:
        bounds = (("num_samples", num_samples, 2), ("every_n_validations", every_n_validations, 1))
        for name, value, least in (*bounds, ("batch_size", batch_size, 1), ("cfg_scale", cfg_scale, 0)):
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.num_samples, self.cfg_scale, self.batch_size = num_samples, cfg_scale, batch_size
        self.every_n_validations = every_n_validations
        self._extractor: Extractor = load_extractor(extractor, weights)  # now, not after hours
        self._reference: RunningMoments | None = None
        self._validations = 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the weights as they are, and the averaged ones; in the first process, while the others wait."""
        if trainer.sanity_checking or trainer.fast_dev_run or not isinstance(pl_module, GeneratorModule):  # type: ignore[attr-defined]
            return
        if pl_module.generator.objective.steps(pl_module.generator.spec) is None:
            return  # this objective learns to fill in, not to write
        self._validations += 1
        if self._validations % self.every_n_validations:
            return
        found = self._scores(trainer, pl_module) if trainer.is_global_zero else {}
        scores: dict[str, float] = trainer.strategy.broadcast(found)  # a checkpoint may go by them, in every process
        for name, value in scores.items():
            trainer.callback_metrics[name] = torch.tensor(value)
        for run in trainer.loggers:
            run.log_metrics(scores, trainer.global_step)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        rank_zero_info(f"step {trainer.global_step}, {self.num_samples} samples: {shown}")

    def _scores(self, trainer: L.Trainer, module: GeneratorModule) -> dict[str, float]:
        self._extractor.to(module.device)
        if self._reference is None:
            self._reference = self._measure_reference(trainer.datamodule)  # type: ignore[attr-defined]
        scores = {f"val/{name}": value for name, value in self._score(module, module.generator).items()}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                averaged: Any = callback._average_model.module  # may be on another device than the run
                found = self._score(module, copy.deepcopy(averaged.generator).to(module.device))
                scores |= {f"val/{name}_ema": value for name, value in found.items()}
        return scores

    def _measure_reference(self, data: ImageDataModule) -> RunningMoments:
        running = RunningMoments(self._extractor.feature_dim)
        for pixels in DataPixels(data, "val").batches(self.batch_size):
            running.update(self._extractor(pixels).features)
        return running

    def _score(self, module: GeneratorModule, generator: Generator) -> dict[str, float]:
        was_training = generator.training
        pipe = Pipeline(module.tokenizer, generator)
        labels = labels_for("balanced", self.num_samples, max(1, pipe.num_classes), 0)
        running, logits = RunningMoments(self._extractor.feature_dim), []
        for samples in pipe.sample_batches(labels, 0, self.batch_size, cfg_scale=self.cfg_scale):
            found = self._extractor(round_pixels(samples.images, "nearest"))
            running.update(found.features)
            logits.append(found.logits.cpu())
        generator.train(was_training)
        assert self._reference is not None
        scores = {score_name("fid", self._extractor): frechet_distance(running, self._reference)}
        if self._extractor.class_names and len(self._extractor.class_names) == pipe.num_classes:
            scores[score_name("accuracy", self._extractor)] = class_accuracy(torch.cat(logits).numpy(), labels)
        return scores
