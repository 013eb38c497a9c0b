"""Sessions that are used again: a captured or compiled step is worth more than one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vision_ar.generator import Generator
from vision_ar.sampler.engine import Condition, Session, guidance_scales
from vision_ar.sampler.guidance import CfgSchedule
from vision_ar.sampler.logits import Law


class SessionPool:
    """Opens sessions of one generator, whose weights stay where they are, and keeps the last finished one.

    Args:
        generator: of all sessions.
        compile: see `Session`.
        cache_dtype: see `Session`.
    """

    def __init__(
        self,
        generator: Generator,
        compile: bool = False,  # noqa: A002 named as users name it
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self._generator, self._compile, self._cache_dtype = generator, compile, cache_dtype
        self._idle: tuple[Any, Session] | None = None  # one only: each holds a whole cache

    def open(
        self,
        condition: Condition,
        seeds: Tensor,
        law: Law | Sequence[Law],
        cfg_schedule: CfgSchedule | None | Sequence[CfgSchedule | None],
        forced: Tensor | None,
    ) -> Session:
        """A session that has written nothing; the arguments are those of `Session`."""
        idle, self._idle = self._idle, None  # taken: another stream may begin before this one ends
        if idle is not None and idle[0] == self._kind(condition, seeds, law, cfg_schedule, forced):
            idle[1].restart(condition, seeds, cfg_schedule, forced)
            return idle[1]
        del idle  # its cache, before another is taken
        return Session(
            self._generator, condition, seeds, law, cfg_schedule, forced,
            compile=self._compile, cache_dtype=self._cache_dtype,
        )  # fmt: skip

    def give_back(self, session: Session, *settings: Any) -> None:
        """Keep a finished session if its step was captured; `settings` are the arguments it was opened with."""
        if session.done and session.fixed:
            self._idle = (self._kind(*settings), session)

    def _kind(self, condition: Condition, seeds: Tensor, law: Any, cfg_schedule: Any, forced: Tensor | None) -> Any:
        """What a captured step is made for; two batches of one kind differ in values alone."""
        guided = guidance_scales(cfg_schedule, len(seeds), self._generator.spec.seq_len) is not None
        parts = [(name, part.shape) for name, part in vars(condition).items() if part is not None]
        return len(seeds), tuple(law) if isinstance(law, Sequence) else law, guided, forced is not None, parts
