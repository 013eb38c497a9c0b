"""Multi-token prediction: extra heads look further ahead."""

from __future__ import annotations

import torch

from vision_ar.interfaces import AttentionPattern, Head, Objective, Plan, Step, Tokens, TokenSpec
from vision_ar.objectives.heads import TokenHead
from vision_ar.objectives.next_token import NextToken
from vision_ar.objectives.readouts import readout


class MultiToken(Objective):
    """Next-token prediction, and `ahead` heads more that predict the tokens after the next one.

    With ahead 0 this is next-token prediction. Samples are written with the first head alone.

    Args:
        ahead: number of extra heads.
        weight: of each extra head's loss.

    Source:
        Gloeckle et al. 2024, arXiv 2404.19737, with linear heads.
    """

    def __init__(self, ahead: int = 1, weight: float = 1.0) -> None:
        if ahead < 0:
            raise ValueError(f"ahead must be at least 0, got {ahead}")
        self.ahead, self.weight = ahead, weight

    @classmethod
    def tiny(cls) -> MultiToken:
        """Two extra heads."""
        return cls(2)

    def heads(self, dim: int, spec: TokenSpec) -> dict[str, Head]:
        """`token`, then `ahead_1`, `ahead_2`, ..."""
        names = ["token", *(f"ahead_{n}" for n in range(1, self.ahead + 1))]
        return {name: TokenHead(dim, spec.vocab_size or 0) for name in names}

    def plan(self, tokens: Tokens, generator: torch.Generator | None = None, progress: float = 0.0) -> Plan:
        """Read all tokens but the last; column c predicts token c + 1 + n with head n."""
        targets = tokens.is_target().nonzero()
        readouts = []
        for n in range(self.ahead + 1):
            of = targets[targets[:, 1] >= n]  # nothing stands before the condition prefix to be read
            at = of - of.new_tensor([0, 1 + n])
            name = f"ahead_{n}" if n else "token"
            readouts.append(readout(tokens, at, of, head=name, weight=self.weight if n else 1.0))
        return Plan(tokens.columns(0, tokens.seq_len - 1), AttentionPattern(), readouts)

    def likelihood(self, tokens: Tokens) -> Plan:
        """That of the first head."""
        return NextToken().likelihood(tokens)

    def steps(self, spec: TokenSpec) -> list[Step]:
        """One token after the other."""
        return NextToken().steps(spec)
