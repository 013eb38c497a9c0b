"""Scores of samples while a generator trains."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from vision_ar.backbones.llama import Llama, LlamaSize
from vision_ar.data.images import Digits
from vision_ar.data.sources import ArraySource, Source
from vision_ar.evaluation.callback import ScoreSamples
from vision_ar.evaluation.extractors import load_extractor
from vision_ar.evaluation.frechet import RunningMoments, frechet_distance
from vision_ar.pipeline import Pipeline
from vision_ar.tokenizers.diffusion import DiffusionTokenizer
from vision_ar.training.callbacks import EMA
from vision_ar.training.generator import GeneratorModule
from vision_ar.training.tokenizer import TokenizerModule

NUM, NUM_VAL = 12, 70
RAW, AVERAGED = "val/fd-cifar10", "val/fd-cifar10_ema"


class FewDigits(Digits):
    """Fewer digits to compare with."""

    def source(self, split: str) -> Source:
        whole = super().source(split)
        return ArraySource(whole.pixels[:NUM_VAL], whole.labels[:NUM_VAL], whole.class_names, split)


class Watch(Callback):
    """Keep what the metrics and the weights are after every validation; to be listed behind the others."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.before: set[str] = set()
        self.raw: list[torch.nn.Module] = []
        self.training: list[bool] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            self.before = set(trainer.callback_metrics)
            return
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.raw.append(copy.deepcopy(pl_module.generator))
        self.training.append(pl_module.tokenizer.training)


def module() -> GeneratorModule:
    """A generator whose images depend on its weights."""
    torch.manual_seed(0)
    tokenizer = DiffusionTokenizer.tiny()
    for weight in tokenizer.velocity.parameters():
        if weight.ndim > 1:  # untrained, parts of them are zero, and images would depend on the seed alone
            torch.nn.init.normal_(weight, std=0.2)
    optimizer = lambda groups: torch.optim.AdamW(groups, lr=0.02)  # noqa: E731
    backbone = lambda spec: Llama(spec, LlamaSize("tiny", dim=32), num_classes=10, dropout=0.1)  # noqa: E731
    return GeneratorModule(tokenizer=tokenizer, backbone=backbone, optimizer=optimizer)


def fit(folder: Path, *callbacks: Callback, module: L.LightningModule, **settings: Any) -> L.Trainer:
    common = {
        "max_steps": 4,
        "val_check_interval": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "limit_val_batches": 1,
        "default_root_dir": folder,
    }
    trainer = L.Trainer(callbacks=list(callbacks), **{**common, **settings})
    trainer.fit(module, FewDigits(image_size=8, batch_size=16))
    return trainer


def scored(tokenizer: DiffusionTokenizer, generator: torch.nn.Module, cfg_scale: float) -> float:
    """Distance of NUM samples to the validation images, the plain way."""
    extractor = load_extractor("cifar10")
    samples = Pipeline(tokenizer, generator).sample([i % 10 for i in range(NUM)], 0, cfg_scale=cfg_scale)
    pixels = (127.5 * samples.images + 127.5).round().to(torch.uint8)
    squares = FewDigits(image_size=8).image_set("val", 8).squares(torch.arange(NUM_VAL))[0]
    found = [RunningMoments(extractor.feature_dim) for _ in range(2)]
    for moments, images in zip(found, (pixels, squares), strict=True):
        moments.update(extractor(images).features)
    return frechet_distance(*found)


def test_the_score_is_that_of_the_weights_and_is_logged(tmp_path, caplog) -> None:
    watch, trained = Watch(), module()
    logger = CSVLogger(tmp_path)
    with caplog.at_level(logging.INFO, logger="vision_ar.evaluation.callback"):
        fit(tmp_path, ScoreSamples(NUM, cfg_scale=2.0), watch, module=trained, logger=logger)
    assert len(watch.metrics) == 2
    first, last = watch.metrics
    assert AVERAGED not in last and first[RAW] != last[RAW]
    assert last[RAW] == pytest.approx(scored(trained.tokenizer, watch.raw[-1].eval(), 2.0), rel=1e-3)
    assert 0 <= last["val/accuracy-cifar10"] <= 1
    assert any(f"{NUM} samples: val/fd-cifar10 {last[RAW]:.3f}" in message for message in caplog.messages)
    logger.finalize("success")
    names, *_ = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert RAW in names.split(",")
    rows = np.genfromtxt(Path(logger.log_dir) / "metrics.csv", delimiter=",", names=True, deletechars="")
    logged = {int(row["step"]): row[RAW] for row in rows if not math.isnan(row[RAW])}
    assert list(logged) == [2, 4] and logged[4] == pytest.approx(last[RAW], rel=1e-4)


def test_every_process_knows_what_the_first_one_measured() -> None:
    strategy = SimpleNamespace(broadcast=lambda own: {RAW: 2.5} if own == {} else own)
    trainer: Any = SimpleNamespace(
        sanity_checking=False, fast_dev_run=False, is_global_zero=False, strategy=strategy, callback_metrics={},
        loggers=[], global_step=1,
    )  # fmt: skip
    ScoreSamples(NUM).on_validation_end(trainer, module())
    assert {name: float(value) for name, value in trainer.callback_metrics.items()} == {RAW: 2.5}


@pytest.mark.parametrize("order", ["ema first", "ema last"])
def test_the_averaged_weights_are_scored_too_under_their_own_name(tmp_path, order) -> None:
    watch, ema, trained = Watch(), EMA(0.9), module()
    score = ScoreSamples(NUM, cfg_scale=2.0)
    callbacks = [ema, score] if order == "ema first" else [score, ema]
    fit(tmp_path, *callbacks, watch, module=trained)
    last = watch.metrics[-1]
    assert last[RAW] == pytest.approx(scored(trained.tokenizer, watch.raw[-1].eval(), 2.0), rel=1e-3)
    averaged = scored(trained.tokenizer, trained.generator.eval(), 2.0)  # the average replaces the weights at the end
    assert last[AVERAGED] == pytest.approx(averaged, rel=1e-3)
    assert last[AVERAGED] != pytest.approx(last[RAW], rel=1e-3)


def test_scoring_leaves_the_training_as_it_was(tmp_path) -> None:
    plain, watched = module(), module()
    fit(tmp_path / "plain", EMA(0.9), module=plain)
    watch = Watch()
    fit(tmp_path / "scored", EMA(0.9), ScoreSamples(NUM), watch, module=watched)
    assert watch.training == [False, False] and all(p.requires_grad for p in watched.generator.parameters())
    for (name, wanted), got in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(wanted, got), name


def test_some_validations_can_be_left_out_and_trial_runs_are(tmp_path) -> None:
    watch = Watch()
    fit(tmp_path, ScoreSamples(NUM, every_n_validations=2), watch, module=module())
    assert [RAW in metrics for metrics in watch.metrics] == [False, True]
    assert watch.before and RAW not in watch.before  # nor is the check before the training scored
    watch = Watch()
    fit(tmp_path, ScoreSamples(NUM), watch, module=module(), fast_dev_run=True)
    assert [RAW in metrics for metrics in watch.metrics] == [False]


def test_a_training_without_samples_goes_on(tmp_path) -> None:
    trained = TokenizerModule(DiffusionTokenizer.tiny())
    trainer = fit(tmp_path, ScoreSamples(NUM), module=trained, max_steps=2)
    assert trainer.global_step == 2 and RAW not in trainer.callback_metrics


def test_a_checkpoint_can_be_chosen_by_the_score(tmp_path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    best = ModelCheckpoint(tmp_path / "best", monitor=RAW, save_on_train_epoch_end=False)
    fit(tmp_path, ScoreSamples(NUM), best, module=module(), enable_checkpointing=True)
    assert best.best_model_score is not None and Path(best.best_model_path).is_file()


@pytest.mark.gpu
def test_both_weights_are_scored_on_a_gpu(tmp_path) -> None:
    watch = Watch()
    fit(tmp_path, ScoreSamples(NUM), EMA(0.9), watch, module=module(), accelerator="gpu", devices=1)
    assert {RAW, AVERAGED} <= watch.metrics[-1].keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 2, got 0"),
        ({"every_n_validations": 0}, "every_n_validations must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_samples": 1}, "num_samples must be at least 2, got 1"),
        ({"cfg_scale": -1.0}, "cfg_scale must be at least 0, got -1.0"),
        ({"extractor": "nope"}, "must be one of inception, .*got nope"),
        ({"weights": "nowhere.pth"}, "weights must be left out for cifar10"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_before_the_training(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreSamples(**settings)
