"""Lightning module that trains any generator on the tokens of any tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from vision_ar.backbones.llama import Llama
from vision_ar.checkpoints.store import load_tokenizer
from vision_ar.generator import Generator
from vision_ar.interfaces import Backbone, Objective, Tokenizer, Tokens, TokenSpec
from vision_ar.objectives.next_token import NextToken
from vision_ar.training.base import TrainingModule
from vision_ar.training.schedules import Schedule
from vision_ar.training.warm_start import load_init, load_tokenizer_weights


class GeneratorModule(TrainingModule):
    """Train one backbone on the tokens of one frozen tokenizer.

    Args:
        tokenizer_from: model folder, training run, bundled name or checkpoint with the trained tokenizer, which is
            never trained here.
        tokenizer: its class and arguments where they should differ from what was saved, in the order of the groups for
            instance; None takes the saved ones.
        backbone: called with the tokenizer's spec.
        objective: what is to be predicted from what.
        optimizer: called with the parameter groups.
        schedule: of the learning rate.
        init_from: model folder, bundled name or checkpoint whose generator weights the run starts from.
        seed: of the draws in training.
    """

    def __init__(
        self,
        tokenizer_from: str | None = None,
        tokenizer: Tokenizer | None = None,
        backbone: Callable[[TokenSpec], Backbone] = Llama,
        objective: Objective = NextToken(),  # noqa: B008 holds no state
        optimizer: OptimizerCallable = partial(torch.optim.AdamW, lr=4e-4, betas=(0.9, 0.95), weight_decay=0.05),
        schedule: Schedule = Schedule(),  # noqa: B008 never changed
        init_from: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.optimizer, self.schedule, self.seed = optimizer, schedule, seed
        self.tokenizer = frozen_tokenizer(tokenizer_from, tokenizer)
        self.generator = Generator(self.tokenizer.spec, backbone, objective)
        if init_from is not None:
            load_init(self, init_from)

    def trained(self) -> nn.Module:
        """The generator; its tokenizer is frozen."""
        return self.generator

    def train(self, mode: bool = True) -> GeneratorModule:
        """Switch the mode of the generator; the frozen tokenizer always stays in evaluation mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def tokens_of(self, batch: dict[str, Tensor]) -> Tokens:
        """Cached ids where the batch has them, else the tokens of its images."""
        if "ids" in batch:
            return Tokens.of(self.tokenizer.spec, ids=batch["ids"], labels=batch["labels"])
        # float32 whatever the precision of the run: a code near a tie must not depend on it
        with torch.autocast(self.device.type, enabled=False):
            return self.tokenizer.encode(batch["images"].float(), batch["labels"])

    def losses(self, batch: dict[str, Tensor], draws: torch.Generator, progress: float) -> dict[str, Tensor]:
        """Named losses of one batch."""
        return self.generator(self.generator.objective.plan(self.tokens_of(batch), draws, progress))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        steps = self.total_steps()
        progress = self.global_step / max(1, steps) if steps is not None else 0.0
        losses = self.losses(batch, self.step_generator(), progress)
        self.log_losses("train", losses, len(batch["labels"]))
        return losses["loss"]

    def evaluate(self, stage: str, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Losses at draws that are the same every time."""
        draws = torch.Generator().manual_seed(batch_idx)
        self.log_losses(stage, self.losses(batch, draws, 1.0), len(batch["labels"]))


def frozen_tokenizer(source: str | None, tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer of a generator: saved, or given with saved weights, or given as it is; frozen."""
    if tokenizer is None:
        if source is None:
            raise ValueError("tokenizer_from must name a trained tokenizer, got None; train one first")
        tokenizer = load_tokenizer(source)
    elif source is not None:
        load_tokenizer_weights(tokenizer, source)
    return tokenizer.requires_grad_(False).eval()
