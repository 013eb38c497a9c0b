"""A callback that leaves the weights and the last images of every process in a folder."""

from pathlib import Path
from typing import Any

import lightning as L
import torch


class WriteParameters(L.Callback):
    """Write `<rank>.pt` when training ends."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.images = batch["images"].sum()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        weights = torch.nn.utils.parameters_to_vector(pl_module.parameters()).detach()
        torch.save({"weights": weights, "images": self.images}, self.folder / f"{trainer.global_rank}.pt")
