"""Next-token prediction."""

from __future__ import annotations

import torch

from vision_ar.interfaces import AttentionPattern, Head, Objective, Plan, Step, Tokens, TokenSpec
from vision_ar.objectives.heads import TokenHead
from vision_ar.objectives.readouts import exact, readout


class NextToken(Objective):
    """Every token is predicted from the condition and the tokens before it.

    Args:
        label_smoothing: of the cross-entropy.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    @classmethod
    def tiny(cls) -> NextToken:
        """The only size there is."""
        return cls()

    def heads(self, dim: int, spec: TokenSpec) -> dict[str, Head]:
        """One token head."""
        return {"token": TokenHead(dim, spec.vocab_size or 0, self.label_smoothing)}

    def plan(self, tokens: Tokens, generator: torch.Generator | None = None, progress: float = 0.0) -> Plan:
        """Read all tokens but the last; column t - 1 predicts token t, the end of the prefix predicts token 0."""
        of = tokens.is_target().nonzero()
        at = of - of.new_tensor([0, 1])
        return Plan(tokens.columns(0, tokens.seq_len - 1), AttentionPattern(), [readout(tokens, at, of)])

    def likelihood(self, tokens: Tokens) -> Plan:
        """The same plan: each law is conditioned on all tokens before."""
        return exact(self.plan(tokens))

    def steps(self, spec: TokenSpec) -> list[Step]:
        """One token after the other."""
        return [Step((), (-1,), (0,))] + [Step((t - 1,), (t - 1,), (t,)) for t in range(1, spec.seq_len)]
