"""The README's commands run as they stand; the two set-up commands are run by `.ci/run`."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vision_ar.checkpoints.store import bundled_names
from vision_ar.evaluation.commands import main as evaluate
from vision_ar.pipeline import load
from vision_ar.sample_cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line and "pip install" not in line]
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_every_link_of_the_readme_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("http")]
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_model_has_a_card() -> None:
    assert bundled_names()
    for name in bundled_names():
        assert len((ROOT / "vision_ar" / "models" / name / "README.md").read_text()) > 500


def test_the_sampling_commands_run_in_order(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line)[2:] for line in COMMANDS if "sample.py" in line and "--model" not in line]
    assert len(commands) >= 2
    for arguments in commands:
        main(arguments)
    assert (tmp_path / "out" / "previews.gif").exists() and (tmp_path / "layout" / "grid.png").exists()


def test_the_python_example_runs() -> None:
    shown = []
    exec(PYTHON[0], {"show": shown.append})  # noqa: S102 our own README
    groups = load("cifar10-dar").tokenizer.spec.groups
    assert len(shown) == len(groups) and shown[0].shape == (1, 3, 32, 32)


def test_the_training_commands_and_the_score_run_in_order(tmp_path, monkeypatch) -> None:
    commands = [shlex.split(line) for line in COMMANDS if "train.py" in line]
    assert len(commands) == 2
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    short = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    for command in commands:
        arguments = [str(ROOT / "train.py"), *command[2:], *short, "--trainer.accelerator=cpu"]
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
    main(["--model", str(tmp_path / "runs" / "dar_digits"), "--num", "2", "--out", str(tmp_path / "digits")])
    assert (tmp_path / "digits" / "00001.png").exists()
    monkeypatch.chdir(tmp_path)
    (command,) = [shlex.split(line) for line in COMMANDS if "-m vision_ar.evaluation" in line]
    evaluate([*command[3:], "--device", "cpu"])
    assert json.loads((tmp_path / "score" / "result.json").read_text())["scores"]["fd-cifar10"] > 0


@pytest.mark.parametrize("command", [line for line in COMMANDS if "--help" in line])
def test_help_commands_help(command) -> None:
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 0 and b"usage" in done.stdout
