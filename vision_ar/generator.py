"""A generator: one backbone with the heads of one objective. Training and sampling both hold this module."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vision_ar.interfaces import Backbone, Objective, Plan, TokenSpec, run


class Generator(nn.Module):
    """Backbone and heads, sized by the tokens they serve.

    Args:
        spec: the tokens.
        backbone: called with `spec`.
        objective: what the backbone learns; says which heads there are.
    """

    def __init__(self, spec: TokenSpec, backbone: Callable[[TokenSpec], Backbone], objective: Objective) -> None:
        super().__init__()
        self.spec, self.objective = spec, objective
        self.backbone = backbone(spec)
        self.heads = nn.ModuleDict(objective.heads(self.backbone.dim, spec))

    def forward(self, plan: Plan) -> dict[str, Tensor]:
        """Losses of a plan; what shards or wraps a model meets all its weights in this call."""
        return run(self.backbone, self.heads, plan)  # type: ignore[arg-type]  # ModuleDict is a mapping
