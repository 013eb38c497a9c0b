"""One token of every row as a fixed program: no shape changes and nothing is decided on the host.

That is what a CUDA graph can capture and `torch.compile` can take whole: position, guidance, law, keyed draw, forced
tokens and the cache write are all on the device, and the column to be read next is a number there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from vision_ar.generator import Generator
from vision_ar.interfaces import Step, Tokens

WARM_UPS = 2
"""Steps before a graph is captured: kernels are built and memory is set aside in them."""


class Written(Protocol):
    """What is being written; `engine.Session` is."""

    generator: Generator
    ids: Tensor
    positions: Tensor
    cache: Any

    @property
    def one_law(self) -> bool:
        """True when all rows have the same law."""

    @property
    def masked(self) -> bool:
        """True when parts of the condition are padding."""

    def fed(self, columns: Tensor) -> Tokens:
        """Columns of the sequences as the backbone reads them."""

    def choose(self, hidden: Tensor, fill: Tensor, head: str) -> Tensor:
        """Tokens of columns `fill` from hidden vectors."""


class TokenLoop:
    """The steps of a session from the second on.

    Args:
        session: its tensors are read and written in place.
        compile: let `torch.compile` take the step.
    """

    def __init__(self, session: Written, compile: bool = False) -> None:  # noqa: A002 named as users name it
        self._session = session
        self._column = torch.zeros(1, dtype=torch.int64, device=session.ids.device)
        self._run: Callable[[], None] = torch.compile(self.run, fullgraph=True) if compile else self.run
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0

    @staticmethod
    def can(session: Written, steps: list[Step]) -> bool:
        """True when every step but the first feeds the token just written and writes the next."""
        plain = all(step == Step((t,), (t,), (t + 1,)) for t, step in enumerate(steps[1:]))
        return plain and session.generator.backbone.fixed_step and session.one_law and not session.masked

    def advance(self) -> None:
        """Write one token of every row."""
        self._steps += 1
        if not self._session.ids.is_cuda or self._steps <= WARM_UPS:
            self._run()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # records, does not run
                self._run()
        self._graph.replay()

    def restart(self) -> None:
        """Begin another batch with what was captured for this one."""
        self._column.zero_()

    def run(self) -> None:
        """The program."""
        session, column = self._session, self._column
        backbone = session.generator.backbone
        embedded = backbone.embed_tokens(session.fed(column))
        positions = session.positions.index_select(1, column + backbone.prefix_len)
        hidden = backbone.read_one(embedded, positions, session.cache)
        written = column + 1
        session.ids.index_copy_(1, written, session.choose(hidden, written, "token"))
        session.cache.lengths.add_(1)
        column.add_(1)
