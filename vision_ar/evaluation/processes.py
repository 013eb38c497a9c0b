"""One process, or several that torchrun started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

PATIENCE = timedelta(hours=12)  # the first process may read a whole set while the others wait


@dataclass(frozen=True)
class Processes:
    """Who this process is among all.

    Args:
        rank: number of this process, 0 is the one that writes and speaks.
        world_size: number of processes.
        local_rank: number on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls) -> Processes:
        """Meet the others, by the environment that torchrun sets; alone without it."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if int(os.environ.get("WORLD_SIZE", 1)) < 2:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=PATIENCE)  # only ever waits; images go through the files
        return cls(*(int(os.environ[name]) for name in names))

    @property
    def first(self) -> bool:
        """True in the process that writes and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world_size > 1:
            dist.barrier()

    @staticmethod
    def leave() -> None:
        """Part from the others, if there are any."""
        if dist.is_initialized():
            dist.destroy_process_group()
