"""One global batch on one process or two, whole or in shards, trains one model; a run goes on on another number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch import Tensor

from vision_ar.checkpoints.store import load_model
from vision_ar.tokenizers.vq import VQTokenizer
from vision_ar.training.tokenizer import TokenizerModule

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "generators" / "vq_digits.yaml"
TOKENIZER = ROOT / "configs" / "tokenizers" / "vq_digits.yaml"
BATCH, STEPS = 64, 6
SHARDED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
}


def fit(folder: Path, processes: int, strategy: object, steps: int = STEPS, ckpt_path: Path | None = None) -> Path:
    """Train the generator of the digits for some steps, in a process of its own; where its files are."""
    folder.mkdir(exist_ok=True)
    config = yaml.safe_load(CONFIG.read_text())
    tokenizer = yaml.safe_load(TOKENIZER.read_text())["model"]["init_args"]["tokenizer"]
    settings = config["model"]["init_args"]
    settings |= {"tokenizer_from": None, "tokenizer": tokenizer}
    settings["backbone"]["init_args"] |= {"dropout": 0.0, "cond_dropout": 0.0, "checkpointing": processes == 2}
    settings["schedule"] |= {"total_steps": STEPS}
    config["data"]["init_args"] |= {"batch_size": BATCH // processes, "drop_last": True}
    saving = {"save_last": True, "every_n_train_steps": 3, "dirpath": str(folder)}
    config["trainer"] |= {
        "accelerator": "cpu", "devices": processes, "strategy": strategy, "max_steps": steps, "limit_val_batches": 0,
        "default_root_dir": str(folder), "logger": False, "enable_progress_bar": False, "val_check_interval": None,
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving}],
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(folder / "config.yaml")]
    command += ["--ckpt_path", str(ckpt_path)] if ckpt_path else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights after all steps of one process."""
    return saved(fit(tmp_path_factory.mktemp("alone"), 1, "auto"))


def check_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", SHARDED], ids=["ddp", "sharded"])
def test_two_processes_train_what_one_does_and_one_goes_on_from_them(tmp_path, alone, strategy) -> None:
    half = fit(tmp_path / "half", 2, strategy, STEPS // 2)
    assert torch.load(half / "last.ckpt", weights_only=True)["global_step"] == STEPS // 2
    assert load_model(half / "model").generator is not None
    check_same(saved(fit(tmp_path / "rest", 1, "auto", ckpt_path=half / "last.ckpt")), alone)


def test_the_default_of_lightning_that_trains_copies_apart_is_refused(monkeypatch) -> None:
    torch.manual_seed(0)
    module = TokenizerModule(VQTokenizer.tiny())
    mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    monkeypatch.setattr(TokenizerModule, "device_mesh", mesh)
    module._trainer = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match="tensor_parallel_size must be 1 and data_parallel_size all processes, got 2"):
        module.configure_model()
