import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from vision_ar.backbones.llama import Llama, LlamaSize
from vision_ar.checkpoints.store import load_model
from vision_ar.data.images import Digits
from vision_ar.layers.velocity import VelocityConfig
from vision_ar.tokenizers.diffusion import CoderConfig, DiffusionTokenizer, LossConfig
from vision_ar.training.callbacks import EMA, CodebookUsage, ExportModel
from vision_ar.training.generator import GeneratorModule
from vision_ar.training.pictures import Pictures
from vision_ar.training.schedules import Schedule
from vision_ar.training.tokenizer import TokenizerModule

ROOT = Path(__file__).resolve().parents[2]


def tokenizer_module(**settings) -> TokenizerModule:
    torch.manual_seed(0)
    tokenizer = DiffusionTokenizer.tiny()
    tokenizer.quantizer.revive_every = 7
    return TokenizerModule(tokenizer, schedule=Schedule("cosine", warmup_steps=5, total_steps=20), **settings)


def generator_module(**settings) -> GeneratorModule:
    torch.manual_seed(0)
    tokenizer = DiffusionTokenizer.tiny()
    return GeneratorModule(
        tokenizer=tokenizer,
        backbone=lambda spec: Llama(spec, LlamaSize("tiny", dim=32), num_classes=10, dropout=0.1),
        schedule=Schedule("linear", total_steps=20),
        **settings,
    )


def data(**settings) -> Digits:
    return Digits(image_size=8, batch_size=64, **settings)


def trainer(folder: Path, max_steps: int, callbacks=(), **settings) -> L.Trainer:
    return L.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        default_root_dir=folder,
        callbacks=[*callbacks, ModelCheckpoint(folder / "checkpoints", save_last=True, every_n_train_steps=10)],
        **settings,
    )


@pytest.mark.parametrize(
    ("module", "num_workers"),
    [(tokenizer_module, 0), (generator_module, 0), (generator_module, 1)],
    ids=["tokenizer", "generator", "generator-worker"],
)
def test_twenty_steps_equal_ten_and_ten_resumed(tmp_path, module, num_workers) -> None:
    whole = module()  # the stop is in the middle of an epoch of 24 steps
    trainer(tmp_path / "whole", 20, [EMA(0.9)]).fit(whole, data(num_workers=num_workers))
    first = module()
    trainer(tmp_path / "parts", 10, [EMA(0.9)]).fit(first, data(num_workers=num_workers))
    second = module()
    last = tmp_path / "parts/checkpoints/last.ckpt"
    trainer(tmp_path / "parts", 20, [EMA(0.9)]).fit(second, data(num_workers=num_workers), ckpt_path=last)
    for (name, wanted), got in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(wanted, got), name
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("module", [tokenizer_module, generator_module], ids=["tokenizer", "generator"])
def test_training_lowers_the_loss(tmp_path, module) -> None:
    trained = module()
    before = trainer(tmp_path, 0).validate(trained, data(), verbose=False)[0]["val/loss"]
    trained.schedule = Schedule(total_steps=60)
    trained.optimizer = lambda groups: torch.optim.AdamW(groups, lr=3e-3)
    trainer(tmp_path, 60).fit(trained, data())
    after = trainer(tmp_path, 0).validate(trained, data(), verbose=False)[0]["val/loss"]
    assert after < 0.97 * before


def test_the_average_warms_up_and_validation_uses_it(tmp_path) -> None:
    module = generator_module()
    ema = EMA(0.999)
    trainer(tmp_path, 10, [ema]).fit(module, data())
    average = 0.0
    for n in range(9):  # after the first update, which copies, update n moves by 1 - min(decay, (1 + n) / (10 + n))
        average += (1 - min(0.999, (2 + n) / (11 + n))) * (1.0 - average)
    assert average > 0.99  # the random start has nearly left the average after ten steps
    torch.testing.assert_close(
        ema._average(torch.zeros(1), torch.ones(1), 1), torch.full((1,), 1 - 2 / 11), rtol=1e-6, atol=0
    )


def test_a_finished_run_leaves_a_model_that_samples(tmp_path) -> None:
    import vision_ar

    module = generator_module()
    callbacks = [Pictures(4), EMA(), CodebookUsage(1), ExportModel()]
    trainer(tmp_path, 3, callbacks, val_check_interval=3).fit(module, data())
    pipe = vision_ar.load(tmp_path)
    samples = pipe.sample(labels=[1, 2], cfg_scale=2.0, seed=3)
    assert samples.images.shape == (2, 3, 8, 8)
    assert pipe.class_names == [str(digit) for digit in range(10)]
    for (name, wanted), got in zip(
        module.generator.state_dict().items(), pipe.generator.state_dict().values(), strict=True
    ):
        assert torch.equal(wanted, got), name
    assert list((tmp_path / "pictures").glob("samples-*.png"))


def test_a_checkpoint_opens_as_a_model_weights_only(tmp_path) -> None:
    trainer(tmp_path, 10).fit(tokenizer_module(), data())
    saved = load_model(tmp_path / "checkpoints" / "last.ckpt")
    assert saved.generator is None and saved.tokenizer.spec.seq_len == 8


def test_init_from_starts_a_new_run_from_old_weights(tmp_path) -> None:
    old = tokenizer_module()
    trainer(tmp_path, 3, [ExportModel()]).fit(old, data())
    new = tokenizer_module(init_from=str(tmp_path))
    assert torch.equal(new.tokenizer.quantizer.codebook, old.tokenizer.quantizer.codebook)
    with pytest.raises(ValueError, match="init_from must hold weights of this model"):
        TrainedElsewhere(init_from=str(tmp_path))


def test_frozen_parts_stay_and_tokens_with_them(tmp_path) -> None:
    module = tokenizer_module(frozen=["encoder", "quantizer"])
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before, start = module.tokenizer.encode(images).ids, module.tokenizer.decoder.from_latents.weight.detach().clone()
    trainer(tmp_path, 8).fit(module, data())  # unused codebook rows would be revived at batch 7
    assert torch.equal(module.tokenizer.encode(images).ids, before)
    assert not torch.equal(module.tokenizer.decoder.from_latents.weight, start)
    with pytest.raises(ValueError, match="frozen must name parts of the tokenizer .encoder, .*got 'encoders'"):
        tokenizer_module(frozen=["encoders"])


class TrainedElsewhere(TokenizerModule):
    """A module without any of the saved names."""

    def __init__(self, init_from: str) -> None:
        L.LightningModule.__init__(self)
        self.other = torch.nn.Linear(1, 1)
        from vision_ar.training.warm_start import load_init

        load_init(self, init_from)


def test_a_tokenizer_of_another_size_is_refused(tmp_path) -> None:
    trainer(tmp_path, 3, [ExportModel()]).fit(tokenizer_module(), data())
    coder, velocity = CoderConfig(32, 1, 16, 0.5, 4), VelocityConfig(32, 1, 4, 16)
    other = DiffusionTokenizer(8, 3, 8, 4, 32, 4, encoder=coder, decoder=coder, velocity=velocity)
    with pytest.raises(ValueError, match="codebook must have shape .32, 4., got .16, 4."):
        GeneratorModule(tokenizer_from=str(tmp_path), tokenizer=other)


def test_more_classes_than_the_generator_knows_are_refused(tmp_path) -> None:
    module = GeneratorModule(tokenizer=DiffusionTokenizer.tiny(), backbone=lambda spec: Llama(spec, num_classes=9))
    with pytest.raises(ValueError, match="num_classes must be at least 10 for this data, got 9"):
        trainer(tmp_path, 1).fit(module, data())


def test_a_run_without_a_last_step_needs_to_know_where_its_schedule_ends(tmp_path) -> None:
    module = tokenizer_module()
    module.schedule = Schedule("cosine")
    endless = {"max_epochs": -1, "max_time": "00:00:00:03"}
    with pytest.raises(ValueError, match="schedule cosine needs total_steps"):
        trainer(tmp_path, -1, **endless).fit(module, data())
    module = generator_module()
    module.schedule = Schedule()
    ended = trainer(tmp_path, -1, **endless)
    ended.fit(module, data())
    assert ended.global_step > 0


def test_pictures_reach_tensorboard_and_the_log_folder(tmp_path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    fitted = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=logger,
        val_check_interval=2,
        limit_val_batches=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Pictures(4)],
    )
    fitted.fit(generator_module(), data())
    log = events.EventAccumulator(logger.log_dir)
    log.Reload()
    assert sorted(log.Tags()["images"]) == ["previews", "samples"]
    assert len(list(Path(logger.log_dir, "pictures").iterdir())) == 2


def test_evaluation_can_be_asked_for_alone(tmp_path) -> None:
    for module, names in ((tokenizer_module(), {"test/psnr", "test/loss"}), (generator_module(), {"test/loss"})):
        assert names <= trainer(tmp_path, 0).test(module, data(), verbose=False)[0].keys()


def test_a_generator_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="tokenizer_from must name a trained tokenizer"):
        GeneratorModule()


ADVERSARY = {"--model.init_args.adversary.init_args.start_step": "2"}


@pytest.mark.parametrize(
    ("name", "strategy", "more"),
    [
        pytest.param("dar_digits", "ddp", {}, id="plain"),
        pytest.param("vq_digits", "ddp_find_unused_parameters_true", ADVERSARY, id="adversary", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_on_different_images_and_agree(tmp_path, name, strategy, more) -> None:
    config = str(ROOT / "configs" / "tokenizers" / f"{name}.yaml")
    writer = "tests.training.write_parameters.WriteParameters"
    options = {
        "--trainer.accelerator": "cpu",
        "--trainer.devices": "2",
        "--trainer.strategy": strategy,
        "--trainer.max_steps": "6",
        "--trainer.val_check_interval": "6",
        "--trainer.limit_val_batches": "1",
        "--trainer.default_root_dir": str(tmp_path),
        "--trainer.callbacks+": f"{{class_path: {writer}, init_args: {{folder: {tmp_path}}}}}",
        "--model.init_args.tokenizer.init_args.losses.revive_every": "4",
        **more,
    }
    command = [sys.executable, str(ROOT / "train.py"), "fit", "--config", config]
    command += [f"{name}={value}" for name, value in options.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first["weights"], second["weights"])
    assert not torch.equal(first["images"], second["images"])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    assert torch.load(checkpoint)["global_step"] == 6
    assert load_model(checkpoint).tokenizer.spec.seq_len == 16


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fused_optimisers_are_clipped_like_plain_ones(tmp_path, precision) -> None:
    ends = []
    for fused in (False, True):
        module = tokenizer_module(optimizer=lambda groups, fused=fused: torch.optim.SGD(groups, lr=1.0, fused=fused))
        start = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
        trainer(tmp_path, 3, gradient_clip_val=0.01, precision=precision).fit(module, data())
        ends.append(torch.nn.utils.parameters_to_vector(module.parameters()).detach())
        assert 0 < (ends[-1] - start).norm() < 0.0301  # three steps of length at most 0.01; unclipped ones are longer
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-4)


def test_losses_that_need_missing_weights_say_how_to_get_them(tmp_path) -> None:
    sizes = {"image_size": 16, "seq_len": 16}
    with pytest.raises(ValueError, match="repa_weights must name a file"):
        DiffusionTokenizer(**sizes, losses=LossConfig(repa=0.5))
    losses = LossConfig(repa=0.5, repa_layer=0, repa_weights=str(tmp_path / "none.pth"))
    tokenizer = DiffusionTokenizer(**sizes, velocity=VelocityConfig(64, 1, 8), losses=losses)
    with pytest.raises(FileNotFoundError, match="repa_weights must be a file with timm's vit_base_patch14_dinov2"):
        tokenizer.training_losses(torch.zeros(2, 3, 16, 16))
