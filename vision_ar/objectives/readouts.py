"""What the objectives share in forming their readouts."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from vision_ar.interfaces import Plan, Readout, Tokens


def readout(tokens: Tokens, at: Tensor, of: Tensor, head: str = "token", weight: float = 1.0) -> Readout:
    """Cross-entropy on the ids of `of`, (Q, 2), read at `at`, (Q, 2)."""
    if tokens.ids is None:
        raise ValueError("this objective needs discrete tokens, got tokens without ids")
    return Readout(at, of, tokens.ids[of[:, 0], of[:, 1]], head=head, weight=weight)


def exact(plan: Plan) -> Plan:
    """The same plan, measured as a likelihood: without smoothing and weights."""
    return replace(plan, readouts=[replace(one, loss="nll", weight=1.0) for one in plan.readouts])
