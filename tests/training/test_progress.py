import re
from pathlib import Path

from vision_ar.training.cli import main

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tokenizers" / "dar_digits.yaml"
SHORT = ["--trainer.max_steps=30", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]


def train(folder: Path, capsys, *args: str) -> str:
    main(["fit", f"--config={CONFIG}", f"--trainer.default_root_dir={folder}", *SHORT, *args])
    return capsys.readouterr().out


def test_the_bar_counts_the_steps_of_all_epochs(tmp_path, capsys) -> None:
    out = train(tmp_path, capsys)  # an epoch has 24 steps
    assert re.search(r"Training: 100%.* 30/30 .*train/loss=", out)
    assert "Epoch" not in out and "v_num" not in out


def test_bars_can_be_turned_off(tmp_path, capsys) -> None:
    assert "Training" not in train(tmp_path, capsys, "--trainer.enable_progress_bar=false")
