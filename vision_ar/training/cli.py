"""The training command line: Lightning's, with this project's defaults."""

from __future__ import annotations

import sys

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI

from vision_ar.training.callbacks import ExportModel
from vision_ar.training.generator import GeneratorModule  # noqa: F401 checkpoints name these classes
from vision_ar.training.tokenizer import TokenizerModule  # noqa: F401


def main(args: list[str] | None = None) -> None:
    """Run `fit`, `validate`, `test` or `predict` as the arguments say; user errors are one line and exit code 2."""
    torch.set_float32_matmul_precision("high")
    try:
        make_cli(args, run=True)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {first_cause(str(error))}", file=sys.stderr)
        raise SystemExit(2) from error


def first_cause(message: str) -> str:
    """The line that matters of a message: parsers wrap what our own classes say in a report of many lines."""
    causes = [line.strip()[2:] for line in message.splitlines() if line.strip().startswith("- ")]
    return causes[0] if causes else " ".join(message.split())


def make_cli(args: list[str] | None, run: bool) -> LightningCLI:
    """Parse and build; with `run`, start what the first argument says."""
    return LightningCLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        trainer_defaults={"callbacks": [ExportModel()]},
        args=args,
        run=run,
        save_config_kwargs={"overwrite": True},
    )
