"""Order of the samples: a pure function of (seed, epoch), continued exactly when a run is resumed.

A key is `epoch * count + index`: it tells a data set which sample is wanted and in which epoch, also inside a worker
process, so that random views need no other state. A plain index is the key of epoch 0.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

NOTHING_TO_RESUME = (-1, 0)


def key_seed(*keys: int | str) -> int:
    """Seed for a torch.Generator that differs for different keys, 0 to 2**32 - 1 (all that the CPU generator uses)."""
    return int.from_bytes(hashlib.blake2b(repr(keys).encode(), digest_size=4).digest(), "big")


class EpochSampler(DistributedSampler[int]):
    """Yield the keys of one epoch that belong to one process.

    Lightning leaves a DistributedSampler alone, so this one divides the samples by itself. Every process gets equally
    many: the first samples of the order are repeated, or with `drop_last` the last ones left out.

    Args:
        count: samples in the whole set, at least 1.
        shuffle: draw a new order in every epoch.
        seed: of the order.
        drop_last: leave samples out, rather than repeat some, when they cannot be divided evenly.
        num_replicas: number of processes.
        rank: of this process, from 0.
    """

    def __init__(
        self,
        count: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        super().__init__(range(count), num_replicas, rank, shuffle, seed, drop_last)  # type: ignore[arg-type]
        self.count = count
        self.start = 0
        """Keys of this process that are passed over, for an epoch that is resumed."""

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self.count)
        if self.shuffle:
            generator = torch.Generator().manual_seed(key_seed("order", self.seed, self.epoch))
            order = torch.randperm(self.count, generator=generator)
        order = order.repeat(max(1, math.ceil(self.total_size / self.count)))[: self.total_size]
        keys = order[self.rank :: self.num_replicas] + self.epoch * self.count
        return iter(keys[self.start :].tolist())


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that continues in the middle of an epoch; Lightning saves and restores its state.

    Its data set gives pairs (batch, bad images), and hears of the bad images in the main process by `report`. The
    constructor is that of DataLoader, because Lightning builds loaders anew when it replaces their sampler.
    """

    processed_fn: Callable[[], int] | None = None
    """Batches of this epoch that were trained on; set it where a state may be saved between a batch and its step."""
    _progress = (0, 0)
    _resume = NOTHING_TO_RESUME

    def state_dict(self) -> dict[str, int]:
        """Epoch of the last batch that was given out, and how many batches of it need not be given out again."""
        epoch, batches = self._progress
        return {"epoch": epoch, "batches": batches if self.processed_fn is None else min(batches, self.processed_fn())}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches that `state` counts, when the same epoch is iterated next."""
        self._progress = self._resume = (state["epoch"], state["batches"])

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: it runs at the first batch, when Lightning has called set_epoch, not when it calls iter().
        epoch, first = self._begin()
        for done, (batch, bad) in enumerate(super().__iter__(), start=first + 1):
            self.dataset.report(bad)  # type: ignore[attr-defined]
            self._progress = (epoch, done)
            yield batch

    def _begin(self) -> tuple[int, int]:
        """The epoch that starts now, and how many of its batches were given out before."""
        (resumed, batches), self._resume = self._resume, NOTHING_TO_RESUME
        if not isinstance(self.sampler, EpochSampler):  # Lightning's, for overfit_batches
            return 0, 0
        epoch = self.sampler.epoch
        done = batches if resumed == epoch else 0
        self.sampler.start = done * (self.batch_size or 1)
        return epoch, done
