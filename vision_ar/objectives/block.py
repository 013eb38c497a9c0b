"""Block prediction: a whole group at once, from all groups before it."""

from __future__ import annotations

import torch

from vision_ar.interfaces import AttentionPattern, Head, Objective, Plan, Step, Tokens, TokenSpec
from vision_ar.objectives.heads import TokenHead
from vision_ar.objectives.readouts import exact, readout


class Block(Objective):
    """Predict `size` tokens in parallel; a token is read at the token of the same place in the block before.

    The first block is read at the end of the condition prefix, so its tokens are drawn from one law. With size 1 this
    is next-token prediction.

    Args:
        size: tokens per block; must divide the sequence.
    """

    def __init__(self, size: int = 1) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size = size

    @classmethod
    def tiny(cls) -> Block:
        """Blocks of two."""
        return cls(2)

    def heads(self, dim: int, spec: TokenSpec) -> dict[str, Head]:
        """One token head."""
        return {"token": TokenHead(dim, spec.vocab_size or 0)}

    def plan(self, tokens: Tokens, generator: torch.Generator | None = None, progress: float = 0.0) -> Plan:
        """Read all blocks but the last; tokens see their own block and those before it."""
        self._check(tokens.seq_len)
        of = tokens.is_target().nonzero()
        at = of.clone()
        at[:, 1] = (of[:, 1] - self.size).clamp(min=-1)
        inputs = tokens.columns(0, tokens.seq_len - self.size)
        block = torch.arange(inputs.seq_len, device=of.device) // self.size
        pattern = AttentionPattern("block", group=block.expand(tokens.batch_size, -1))
        return Plan(inputs, pattern, [readout(tokens, at, of)])

    def likelihood(self, tokens: Tokens) -> Plan:
        """The same plan: tokens of a block are independent given all blocks before."""
        return exact(self.plan(tokens))

    def steps(self, spec: TokenSpec) -> list[Step]:
        """One block after the other."""
        self._check(spec.seq_len)
        size = self.size
        steps = [Step((), (-1,) * size, tuple(range(size)))]
        for start in range(size, spec.seq_len, size):
            before = tuple(range(start - size, start))
            steps.append(Step(before, before, tuple(range(start, start + size)), attention="full"))
        return steps

    def _check(self, seq_len: int) -> None:
        if seq_len % self.size:
            raise ValueError(f"size must divide seq_len={seq_len}, got {self.size}")
