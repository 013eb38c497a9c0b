"""The training command line: Lightning's, with this project's defaults."""

from __future__ import annotations

import pickle
import warnings
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from vision_ar.command_line import explain, fail
from vision_ar.training.callbacks import ExportModel
from vision_ar.training.generator import GeneratorModule  # noqa: F401 checkpoints name these classes
from vision_ar.training.plan import plan_training
from vision_ar.training.precision import fitting_precision
from vision_ar.training.progress import StepProgress
from vision_ar.training.tokenizer import TokenizerModule  # noqa: F401

TRAINING_ERRORS = (ValueError, OSError, ImportError, pickle.UnpicklingError, MisconfigurationException)
"""What wrong settings, files and data end in; other errors are faults of the program and keep their traceback."""


def main(args: list[str] | None = None) -> None:
    """Run `fit`, `validate` or `test` as the arguments say; user errors are one line and exit code 2."""
    torch.set_float32_matmul_precision("high")
    # with an adversary: Lightning advises to save weights from before the step; ours are those after it, as everywhere
    warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")
    try:
        make_cli(args, run=True)
    except TRAINING_ERRORS as error:
        fail(first_cause(explain_unread(error)))


def explain_unread(error: BaseException) -> str:
    """What the error says; a refused checkpoint is not told how to be run as code."""
    if isinstance(error, pickle.UnpicklingError):
        return "ckpt_path must be a checkpoint of this project with plain tensors, got a file that was refused"
    if isinstance(error, OSError):
        return explain(error)
    return str(error)


def first_cause(message: str) -> str:
    """The line that matters of a message: parsers wrap what our own classes say in a report of many lines."""
    causes = [line.strip()[2:] for line in message.splitlines() if line.strip().startswith("- ")]
    return causes[0] if causes else " ".join(message.split())


class OneLineLightningParser(LightningArgumentParser):
    """Lightning's argument parser, whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what was wrong and leave."""
        fail(first_cause(message))


class CommandLine(LightningCLI):
    """Lightning's command line with our progress bar, unless the arguments turn bars off or bring one."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Without `predict`, which would drop what it computes: `sample.py` and `cache_codes` write theirs."""
        return {name: kept for name, kept in LightningCLI.subcommands().items() if name != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the flag that only plans a run."""
        parser.add_argument(
            "--print_plan",
            action="store_true",
            help="print weights, memory of a GPU and FLOPs of a step, and stop; needs neither memory nor a GPU",
        )

    @property
    def plans(self) -> bool:
        """True when the run is only to be planned."""
        return bool((self.config[self.subcommand] if self.subcommand else self.config).get("print_plan"))

    def instantiate_classes(self) -> None:
        """Build everything; for a plan without numbers."""
        if not self.plans:
            super().instantiate_classes()
            return
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
        with torch.device("meta"):
            super().instantiate_classes()

    def before_fit(self) -> None:
        """Say what a step takes, and stop, where that was asked for."""
        if self.plans:
            print("\n".join(plan_training(self.model, self.trainer, self.datamodule).lines()))
            raise SystemExit(0)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add the bar to the callbacks that a trainer always gets; a trial run leaves no checkpoint."""
        given = (self.config_init[self.subcommand] if self.subcommand else self.config_init)["trainer"]
        given["precision"] = fitting_precision(given.get("precision"), given.get("accelerator"))
        if given.get("fast_dev_run"):  # Lightning 2.6 writes last.ckpt even then
            given["callbacks"] = [c for c in given.get("callbacks") or [] if not isinstance(c, ModelCheckpoint)]
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
        parser_class=OneLineLightningParser,
        run=run,
        save_config_kwargs={"overwrite": True},
    )
