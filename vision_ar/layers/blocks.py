"""Attention with normalised queries and keys, and the gated transformer block built on it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vision_ar.layers.attention import Allowed, attend
from vision_ar.layers.kv_cache import KVCache
from vision_ar.layers.rope import apply_rotary

NORM_EPS = 1e-6
Table = tuple[Tensor, Tensor]


def plain_norm(x: Tensor) -> Tensor:
    """Layer norm without weights over the last axis."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


class NormedAttention(nn.Module):
    """Attention whose queries and keys pass a layer norm per head before rotation; self- or cross-attention.

    Args:
        dim: width D.
        head_dim: width E of a head; D / E heads.
    """

    def __init__(self, dim: int, head_dim: int = 64) -> None:
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"dim must be a multiple of head_dim={head_dim}, got {dim}")
        self.head_dim = head_dim
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.q_norm = nn.LayerNorm(head_dim, eps=NORM_EPS)
        self.k_norm = nn.LayerNorm(head_dim, eps=NORM_EPS)

    def forward(
        self,
        x: Tensor,
        source: Tensor | None = None,
        allowed: Allowed = Allowed(),  # noqa: B008 an immutable tuple
        query_table: Table | None = None,
        key_table: Table | None = None,
        kv_cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Attend from `x` (B, T, D) to `source` (B, S, D), itself by default."""
        source = x if source is None else source
        queries, keys, values = (
            rearrange(to(y), "b t (n e) -> b n t e", e=self.head_dim)
            for to, y in ((self.q, x), (self.k, source), (self.v, source))
        )
        queries = apply_rotary(self.q_norm(queries), query_table).to(values.dtype)
        keys = apply_rotary(self.k_norm(keys), key_table).to(values.dtype)
        if kv_cache is not None:
            keys, values = kv_cache.append(layer, keys, values)
        return self.proj(rearrange(attend(queries, keys, values, allowed), "b n t e -> b t (n e)"))


class SiluMLP(nn.Module):
    """Two linear layers with SiLU between, hidden width four times the input.

    Args:
        dim: width D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.fc2(F.silu(self.fc1(x)))


class GatedBlock(nn.Module):
    """Pre-norm transformer block whose branches are scaled by learned vectors.

    Args:
        dim: width D.
        head_dim: width of a head.
        gate_init: start of the scales; 0 in the paper, where the block begins as the identity.
    """

    def __init__(self, dim: int, head_dim: int = 64, gate_init: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS), nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn, self.mlp = NormedAttention(dim, head_dim), SiluMLP(dim)
        self.gate1, self.gate2 = (nn.Parameter(torch.full((dim,), gate_init)) for _ in range(2))

    def forward(
        self,
        x: Tensor,
        allowed: Allowed,
        table: Table | None = None,
        kv_cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        attended = self.attn(self.norm1(x), None, allowed, table, table, kv_cache, layer)
        x = x + self.gate1 * attended
        return x + self.gate2 * self.mlp(self.norm2(x))
