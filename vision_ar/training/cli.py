"""The training command line: Lightning's, with this project's defaults."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningCLI

from vision_ar.training.callbacks import ExportModel
from vision_ar.training.generator import GeneratorModule  # noqa: F401 checkpoints name these classes
from vision_ar.training.progress import StepProgress
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


class CommandLine(LightningCLI):
    """Lightning's command line with our progress bar, unless the arguments turn bars off or bring one."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add the bar to the callbacks that a trainer always gets."""
        given = (self.config_init[self.subcommand] if self.subcommand else self.config_init)["trainer"]
        bars = [c for c in given.get("callbacks") or [] if isinstance(c, ProgressBar)]
        if given.get("enable_progress_bar") is not False and not bars:
            self.trainer_defaults = {"callbacks": [*self.trainer_defaults["callbacks"], StepProgress()]}
        return super().instantiate_trainer(**kwargs)


def make_cli(args: list[str] | None, run: bool) -> LightningCLI:
    """Parse and build; with `run`, start what the first argument says."""
    return CommandLine(
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
