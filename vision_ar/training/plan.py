"""What a training takes, said before it starts: weights, memory of a GPU, arithmetic of a step.

Everything is counted on the meta device, which has shapes and no numbers, so that a run for a cluster can be planned on
a laptop. Activations are those that autograd keeps for a batch, in the precision of the run; a GPU needs some room more
for buffers and fragments.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vision_ar.interfaces import ImageTokenizer, Tokens
from vision_ar.training.base import TrainingModule
from vision_ar.training.callbacks import EMA
from vision_ar.training.generator import GeneratorModule
from vision_ar.training.tokenizer import TokenizerModule

OPTIMIZER_COPIES = 2
"""Numbers that AdamW keeps for every weight."""
BACKWARD = 2
"""A backward pass costs two forward passes."""


@dataclass
class TrainingPlan:
    """What a step takes.

    Args:
        weights: trained weights.
        frozen: weights that are only read.
        processes: GPUs or CPU processes together.
        batch: samples of a process.
        state_bytes: weights, gradients, optimiser and average, of a process.
        activation_bytes: what a forward pass keeps for the backward pass, of a process.
        flops: of a step, all processes together.
    """

    weights: int
    frozen: int
    processes: int
    batch: int
    state_bytes: float
    activation_bytes: float
    flops: float

    def lines(self) -> list[str]:
        """The same for people."""
        state, kept = (round(x / 2**30, 1) for x in (self.state_bytes, self.activation_bytes))
        samples = self.batch * self.processes
        return [
            f"weights          {self.weights:,} trained, {self.frozen:,} frozen",
            f"batch            {self.batch} x {self.processes} processes = {samples} samples a step",
            f"memory of one    {state + kept:.1f} GiB: {state} weights, gradients and optimiser, {kept} activations",
            f"a step           {self.flops / 1e12:.3g} TFLOP",
        ]


def plan_training(module: TrainingModule, trainer: L.Trainer, data: Any) -> TrainingPlan:
    """Count what one step of this run takes.

    Args:
        module: built, on any device.
        trainer: with its strategy, precision and callbacks.
        data: its data module, for batch size.
    """
    trained = [p for p in module.trained().parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    adversary = getattr(module, "adversary", None)
    more = sum(p.numel() for p in adversary.parameters()) if isinstance(adversary, nn.Module) else 0
    frozen = sum(p.numel() for p in module.parameters()) - count - more
    processes = trainer.world_size
    sharded = isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))
    averaged = any(isinstance(callback, EMA) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    copies = 2 + OPTIMIZER_COPIES + averaged
    state = 4.0 * copies * (count + more) / (processes if sharded else 1) + 4.0 * frozen
    kept, flops = measure(module, trainer)
    half = str(trainer.precision).startswith(("bf16", "16"))
    batch = int(data.batch_size)
    activations = batch * kept * (0.5 if half else 1.0)
    return TrainingPlan(
        count + more, frozen, processes, batch, state, activations, (1 + BACKWARD) * flops * batch * processes
    )


def measure(module: TrainingModule, trainer: L.Trainer) -> tuple[float, float]:
    """Bytes that autograd keeps for one sample in float32, and FLOPs of its forward pass."""
    kept: dict[int, int] = {}
    weights: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = max(kept.get(storage._cdata, 0), tensor.nbytes)
        alive.append(storage)  # an address must not be given away while it is counted
        return tensor

    alive: list[Any] = []
    forward = forward_of(module)
    weights |= {p.untyped_storage()._cdata for p in forward.__self__.parameters()}  # type: ignore[attr-defined]
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), counter:
        forward()
    return float(sum(kept.values())), float(counter.get_total_flops())


class OnMeta(nn.Module):
    """A copy of what is trained, on the meta device, with its forward pass for one sample.

    Args:
        module: the training module.
    """

    def __init__(self, module: TrainingModule) -> None:
        super().__init__()
        part = module.generator if isinstance(module, GeneratorModule) else module.tokenizer
        named = [*part.parameters(), *part.buffers()]  # type: ignore[union-attr]
        shapes = {id(x): nn.Parameter(x.to("meta")) if isinstance(x, nn.Parameter) else x.to("meta") for x in named}
        self.part = copy.deepcopy(part, shapes).train()  # type: ignore[union-attr]
        self.made_of = module

    def generate(self) -> None:
        """Loss of one sequence."""
        generator: Any = self.part
        spec, backbone = generator.spec, generator.backbone
        with torch.device("cpu"):  # what is read where depends on numbers
            ids = torch.zeros(1, spec.seq_len, dtype=torch.int64) if spec.vocab_size else None
            latents = torch.zeros(1, spec.seq_len, spec.latent_dim) if spec.latent_dim else None
            condition: dict[str, Any] = {"labels": torch.zeros(1, dtype=torch.int64)} if backbone.num_classes else {}
            plan = generator.objective.plan(Tokens.of(spec, ids=ids, latents=latents, **condition))
        generator(on_meta(plan))

    def tokenize(self) -> None:
        """Losses of one image, without judges that have weights of their own."""
        tokenizer: Any = self.part
        tokenizer.eval()  # no bookkeeping of codes
        tokenizer.drop_training_parts()
        tokenizer.training_pass(torch.zeros(1, tokenizer.channels, tokenizer.image_size, tokenizer.image_size))


def on_meta(value: Any) -> Any:
    """A plan, or a part of it, without its numbers."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, list):
        return [on_meta(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: on_meta(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    return value


def forward_of(module: TrainingModule) -> Callable[[], None]:
    """The forward pass to count.

    Raises:
        ValueError: for a module that has none that is known.
    """
    copied = OnMeta(module)
    if isinstance(module, GeneratorModule):
        return copied.generate
    if isinstance(module, TokenizerModule) and isinstance(module.tokenizer, ImageTokenizer):
        return copied.tokenize
    raise ValueError(f"print_plan must be used with a generator or an image tokenizer, got {type(module).__name__}")
