"""Masked prediction of discrete tokens: hide a share, predict what is hidden."""

from __future__ import annotations

import torch

from vision_ar.interfaces import FREE, AttentionPattern, Head, Objective, Plan, Tokens, TokenSpec
from vision_ar.objectives.heads import TokenHead
from vision_ar.objectives.readouts import readout


class Masked(Objective):
    """Hide a random share of the tokens of each sample and predict them where they stand, all seeing all.

    The share is drawn per sample from [low, high]: equal ends are a fixed ratio, 0 to 1 is MLM-U. At least one token
    is hidden. The backbone needs `mask_token`.

    Args:
        low: smallest share hidden.
        high: largest share hidden.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        if not 0 <= low <= high <= 1:
            raise ValueError(f"low and high must satisfy 0 <= low <= high <= 1, got {low} and {high}")
        self.low, self.high = low, high

    @classmethod
    def tiny(cls) -> Masked:
        """Any share."""
        return cls()

    def heads(self, dim: int, spec: TokenSpec) -> dict[str, Head]:
        """One token head."""
        return {"token": TokenHead(dim, spec.vocab_size or 0)}

    def plan(self, tokens: Tokens, generator: torch.Generator | None = None, progress: float = 0.0) -> Plan:
        """Hide the targets that rank lowest in a random order, read at their own columns."""
        assert tokens.ids is not None
        may = tokens.is_target()
        device = generator.device if generator else may.device
        share = self.low + (self.high - self.low) * torch.rand(may.shape[0], 1, generator=generator, device=device)
        order = torch.rand(may.shape, generator=generator, device=device).to(may.device)
        rank = order.masked_fill(~may, 2.0).argsort(dim=1).argsort(dim=1)
        count = (share.to(may.device) * may.sum(dim=1, keepdim=True)).round().clamp(min=1)
        masked = may & (rank < count)
        of = masked.nonzero()
        inputs = tokens.columns(0, tokens.seq_len)
        inputs.ids = tokens.ids.masked_fill(masked, FREE)
        return Plan(inputs, AttentionPattern("full"), [readout(tokens, of, of)])
