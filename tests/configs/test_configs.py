"""Every config parses and builds; those on embedded data also train for a step."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from vision_ar.checkpoints.store import Description, build, describe, save_model
from vision_ar.interfaces import Tokenizer
from vision_ar.training.cli import main, make_cli

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
FULL_SIZE = {  # trained weights, as published
    "tokenizers/dar_imagenet256": 307_440_000, "tokenizers/vq16_imagenet256": 71_880_000,
    "generators/dar_l": 342_910_976, "generators/dar_xl": 774_699_520, "generators/llamagen_b": 110_888_448,
    "generators/llamagen_l": 342_910_976, "generators/llamagen_xl": 774_699_520,
    "generators/llamagen_xxl": 1_410_972_672, "generators/llamagen_3b": 3_096_659_200,
}  # fmt: skip
SMALL = [path for path in CONFIGS if f"{path.parent.name}/{path.stem}" not in FULL_SIZE]
OVERLAYS = {
    "dar_cifar10_reversed": "dar_cifar10",
    "dar_fashion_reversed": "dar_fashion",
    "dar_cifar10_decoder": "dar_cifar10",
}  # these change a few lines of another config
EMBEDDED = [path for path in CONFIGS if "digits" in path.name]


def tokenizer_folder(name: str, folder: Path) -> Path:
    """An untrained tokenizer as the config of that name describes it, saved."""
    config = yaml.safe_load((ROOT / "configs" / "tokenizers" / f"{name}.yaml").read_text())
    torch.manual_seed(0)
    tokenizer = build(config["model"]["init_args"]["tokenizer"], Tokenizer)
    return save_model(folder, Description(describe(tokenizer)), {"tokenizer": tokenizer}, "")


def arguments(path: Path, folder: Path) -> list[str]:
    base = OVERLAYS.get(path.stem, path.stem)
    files = [path.with_stem(base), path] if base != path.stem else [path]
    given = [f"--config={file}" for file in files]
    if path.parent.name == "generators":
        given.append(f"--model.init_args.tokenizer_from={tokenizer_folder(base, folder)}")
    elif "init_from" in path.read_text():
        given.append(f"--model.init_args.init_from={tokenizer_folder(base, folder)}")
    return given


@pytest.mark.parametrize("path", SMALL, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_small_config_builds(path, tmp_path) -> None:
    cli: LightningCLI = make_cli(arguments(path, tmp_path), run=False)
    assert sum(p.numel() for p in cli.model.parameters()) > 0
    assert dataclasses.asdict(cli.model.description())["tokenizer"]["class_path"].startswith("vision_ar.")


QUICK = ("vq16_imagenet256", "dar_l", "llamagen_3b")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x.endswith(QUICK) else [pytest.mark.slow]) for x in FULL_SIZE]
)
def test_full_size_configs_are_planned_with_the_published_weights(name, monkeypatch, capsys) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    given = ["fit", f"--config={path}", "--print_plan", "--trainer.accelerator=cpu"]
    if path.parent.name == "generators":
        kind = "dar" if path.stem.startswith("dar") else "vq16"
        config = yaml.safe_load((ROOT / "configs" / "tokenizers" / f"{kind}_imagenet256.yaml").read_text())
        described = config["model"]["init_args"]["tokenizer"]
        arguments = {key: value for key, value in described["init_args"].items() if key != "losses"}
        given += ["--model.init_args.tokenizer_from=null", f"--model.init_args.tokenizer={described['class_path']}"]
        given += [f"--model.init_args.tokenizer.init_args={json.dumps(arguments)}"]
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[:1] in "wma")
    trained = int(lines["weights"].split()[0].replace(",", ""))
    adversary = 2_765_633 if name.endswith("vq16_imagenet256") else 0
    assert trained - adversary == pytest.approx(FULL_SIZE[name], abs=0 if "generators" in name else 5_000)
    assert "GiB" in lines["memory"] and "TFLOP" in lines["a"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_says_what_how_and_how_well(path) -> None:
    first, command, expected = path.read_text().splitlines()[:3]
    assert first.startswith("# ")
    assert command.startswith("# python train.py fit --config configs/") and path.name in command
    assert expected.startswith("# Expected: ")


@pytest.mark.parametrize("path", EMBEDDED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_embedded_configs_train_a_step(path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["fit", *arguments(path, tmp_path / "tokenizer"), "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"])
    assert not (tmp_path / "runs").exists()  # a trial run leaves nothing behind


GENERATOR = str(ROOT / "configs" / "generators" / "dar_digits.yaml")
TOKENIZER = str(ROOT / "configs" / "tokenizers" / "dar_digits.yaml")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit", "--config", GENERATOR, "--model.init_args.tokenizer_from=nowhere"], "model must be a bundled name"),
        (["fit", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["fit", "--config", TOKENIZER, "--trainer.no_such=1"], "no_such"),
        (["fit", "--config", TOKENIZER, "--ckpt_path", str(ROOT / "README.md")], "ckpt_path must be a checkpoint"),
        (["fit", "--config", TOKENIZER, "--trainer.max_steps=abc"], "max_steps"),
        (["predict", "--config", TOKENIZER], "predict"),
        (
            [
                "fit",
                f"--config={TOKENIZER}",
                "--model.init_args.tokenizer.init_args.losses.lpips=0.5",
                "--model.init_args.tokenizer.init_args.channels=3",
                "--data.init_args.channels=3",
                "--trainer.max_steps=1",
            ],
            "LPIPS needs the weights of VGG-16 in",
        ),
        (
            [
                "fit",
                f"--config={TOKENIZER}",
                "--model.init_args.tokenizer.init_args.losses={classifier: 0.1, classifier_weights: no.safetensors}",
                "--model.init_args.tokenizer.init_args.channels=3",
                "--model.init_args.tokenizer.init_args.image_size=32",
                "--data.init_args.channels=3",
                "--data.init_args.image_size=32",
                "--trainer.max_steps=1",
            ],
            "no.safetensors must be a classifier file, got no such file",
        ),
    ],
    ids=["tokenizer_from", "config", "option", "ckpt_path", "value", "predict", "lpips", "classifier"],
)
def test_user_errors_of_training_are_one_line_with_code_2(args, message, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    error = [line for line in lines if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]
    assert not [line for line in lines if line.startswith(("usage:", "Traceback"))]
