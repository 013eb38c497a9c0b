"""Llama-style transformer for token sequences with a class or feature condition (LlamaGen, D-AR and their kin)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vision_ar.interfaces import FREE, AttentionPattern, Backbone, Tokens, TokenSpec
from vision_ar.kernels import fused_block
from vision_ar.kernels.decode_attention import decode_attention
from vision_ar.layers.attention import allow, attend
from vision_ar.layers.kv_cache import ColumnCache, DeviceSlot, KVCache, new_cache
from vision_ar.layers.mlp import SwiGLU
from vision_ar.layers.packed import add_linear, weights_of
from vision_ar.layers.rope import apply_rotary, rotary_table

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From queries, keys and values of one layer, (B, N, T, E), to what the queries read, (B, N, T, E)."""
INIT_STD = 0.02
NORM_EPS = 1e-5
SILENT = -1  # position of a prefix vector whose queries and keys are zero, see `rotary_table`
PRESETS = {  # dim, depth, num_heads; B to 3B as LlamaGen names them
    "tiny": (64, 2, 2),
    "small": (256, 6, 4),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1280, 36, 20),
    "XXL": (1536, 48, 24),
    "3B": (3200, 24, 32),
}


@dataclass
class LlamaSize:
    """Sizes of the transformer.

    Args:
        preset: tiny, small, B, L, XL, XXL or 3B; the other arguments override it.
        dim: width.
        depth: number of blocks.
        num_heads: query heads.
        num_kv_heads: key-value heads for grouped-query attention; None is one per query head.
    """

    preset: str = "small"
    dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        dim, _, num_heads, num_kv_heads = self.resolved()
        if dim % num_heads or num_heads % num_kv_heads:
            raise ValueError(
                "dim must be a multiple of num_heads and num_heads of num_kv_heads, "
                f"got {dim}, {num_heads}, {num_kv_heads}"
            )

    def resolved(self) -> tuple[int, int, int, int]:
        """dim, depth, num_heads and num_kv_heads, the preset's where none are given."""
        dim, depth, num_heads = PRESETS[self.preset]
        heads = self.num_heads or num_heads
        return self.dim or dim, self.depth or depth, heads, self.num_kv_heads or heads


class Llama(Backbone):
    """Pre-norm transformer with rotary positions, SwiGLU and RMSNorm; the condition is a prefix.

    Args:
        spec: the tokens it reads.
        size: preset and sizes.
        num_classes: classes of the label table, which has one row more for "no class".
        cond_dim: width of external condition features; 0 for class labels.
        cond_len: number of external condition vectors.
        rotary: 1d, 2d or none.
        silent_prefix: LlamaGen's convention, prefix queries and keys are zero; else the prefix is rotated normally.
        dropout: on input tokens, attention output and feed-forward output.
        cond_dropout: share of training samples whose condition is dropped, for guidance.
        mask_token: give hidden tokens (id -1) a vector of their own, for objectives that hide tokens.
        flex: FlexAttention instead of SDPA where a mask is needed, compiled on a GPU; a CPU trains with SDPA anyway.
        checkpointing: keep only what enters each block and compute the rest again in the backward pass: a third more
            arithmetic for a fraction of the memory.
    """

    fixed_step = True

    def __init__(
        self,
        spec: TokenSpec,
        size: LlamaSize = LlamaSize(),  # noqa: B008 never changed
        num_classes: int = 10,
        cond_dim: int = 0,
        cond_len: int = 1,
        rotary: str = "1d",
        silent_prefix: bool = False,
        dropout: float = 0.0,
        cond_dropout: float = 0.1,
        mask_token: bool = False,
        flex: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if rotary not in ("1d", "2d", "none"):
            raise ValueError(f"rotary must be 1d, 2d or none, got {rotary!r}")
        if rotary == "2d" and (spec.grid is None or len(spec.grid) != 2):
            raise ValueError(f"rotary 2d needs tokens on a grid of two axes, got grid {spec.grid}")
        dim, depth, num_heads, num_kv_heads = size.resolved()
        self.spec, self.dim, self.head_dim, self.num_kv_heads = spec, dim, dim // num_heads, num_kv_heads
        self.rotary, self.silent_prefix, self.flex, self.checkpointing = rotary, silent_prefix, flex, checkpointing
        self.num_classes, self.cond_dropout = 0 if cond_dim else num_classes, cond_dropout
        self.prefix_len, self.cond_shape = (cond_len, (cond_len, cond_dim)) if cond_dim else (1, None)
        self.condition = FeatureCondition(cond_dim, cond_len, dim) if cond_dim else None
        self.label_table = None if cond_dim else nn.Embedding(num_classes + 1, dim)
        self.token_table = nn.Embedding(spec.vocab_size, dim) if spec.vocab_size else None
        self.latent_proj = nn.Linear(spec.latent_dim, dim) if spec.latent_dim else None
        self.mask_vector = nn.Parameter(torch.zeros(dim)) if mask_token else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(LlamaBlock(dim, num_heads, num_kv_heads, dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.apply(init_weights)

    @classmethod
    def tiny(cls) -> Llama:
        """2 blocks of width 32 over 8 tokens of 16 ids in 4 groups."""
        spec = TokenSpec(8, (2, 2, 2, 2), vocab_size=16)
        return cls(spec, LlamaSize("tiny", dim=32), num_classes=3, mask_token=True)

    @property
    def null_label(self) -> int:
        """The label that means no class."""
        return self.num_classes

    def embed_condition(self, tokens: Tokens) -> Tensor:
        """Label row or projected features, (B, P, D); dropped at random in training, absent means unconditional."""
        device = tokens.positions.device
        drop = torch.zeros(tokens.batch_size, dtype=torch.bool, device=device)
        if self.training and self.cond_dropout:
            drop = torch.rand(tokens.batch_size, device=device) < self.cond_dropout
        if self.condition is not None:
            return self.condition(tokens.cond, drop)
        assert self.label_table is not None
        labels = tokens.labels
        if labels is None:
            labels = torch.full((tokens.batch_size,), self.null_label, device=device)
        return self.label_table(labels.masked_fill(drop, self.null_label))[:, None]

    def embed_tokens(self, tokens: Tokens) -> Tensor:
        """Rows of the token table and projected latents, added, (B, T, D)."""
        parts = []
        if tokens.ids is not None:
            assert self.token_table is not None
            rows = self.token_table(tokens.ids.clamp(min=0))
            if self.mask_vector is not None:
                rows = torch.where((tokens.ids == FREE)[..., None], self.mask_vector.to(rows.dtype), rows)
            parts.append(rows)
        if tokens.latents is not None:
            assert self.latent_proj is not None
            parts.append(self.latent_proj(tokens.latents))
        return self.dropout(sum(parts))

    def place(self, tokens: Tokens) -> Tensor:
        """1D: prefix first, then tokens, counted on. 2D: the grid, with the prefix at the origin or silent."""
        batch, prefix = tokens.batch_size, self.prefix_len
        if self.rotary == "1d":
            ahead = torch.arange(prefix, device=tokens.positions.device)[None, :, None].expand(batch, -1, 1)
            ahead = torch.full_like(ahead, SILENT) if self.silent_prefix else ahead
            return torch.cat([ahead, self._counted(tokens.positions) + prefix], dim=1)
        start = SILENT if self.silent_prefix else 0
        return F.pad(tokens.positions, (0, 0, prefix, 0), value=start)

    def _counted(self, positions: Tensor) -> Tensor:
        """Places (B, T, A) as one number each, row-major on a grid, (B, T, 1)."""
        grid = self.spec.grid or (self.spec.seq_len,)
        strides = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
        return (positions * torch.tensor(strides, device=positions.device)).sum(dim=-1, keepdim=True)

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        attention: AttentionPattern,
        kv_cache: KVCache | None = None,  # type: ignore[override]  # the one cache class there is
        cond_mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden vectors after the last norm, (B, T, D)."""
        length = embeddings.shape[1]
        started = kv_cache is not None and kv_cache.common_length != 0
        allowed = allow(
            attention, length, 0 if started else self.prefix_len, embeddings.device, kv_cache, cond_mask, self.flex
        )
        one_more = length == 1 and started and not torch.is_grad_enabled()  # slots are written in place
        if one_more and isinstance(kv_cache, ColumnCache) and kv_cache.common_length and allowed.mask is not None:
            return self._through(
                embeddings, positions, [slot.attend for slot in kv_cache.stage_one(allowed.mask[:, 0])]
            )

        def attended(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            if kv_cache is not None:
                keys, values = kv_cache.append(layer, keys, values)
            return attend(queries, keys, values, allowed)

        return self._through(embeddings, positions, [partial(attended, layer) for layer in range(len(self.blocks))])

    def read_one(self, embeddings: Tensor, positions: Tensor, kv_cache: KVCache) -> Tensor:  # type: ignore[override]
        """One new token of every row, its slots found on the device: shapes and program are always the same.

        The caller counts `kv_cache.lengths` on.
        """
        slots, blocks = kv_cache.device_slots(), cast(list[LlamaBlock], list(self.blocks))
        if not blocks[0].fused_serves(embeddings[:, 0]):
            return self._through(embeddings, positions, [slot.attend for slot in slots])
        table = self._table(positions)
        turns = None if table is None else (table[0][:, 0, 0], table[1][:, 0, 0])
        x = embeddings[:, 0]
        for block, slot in zip(blocks, slots, strict=True):
            x = block.fused_step(x, turns, slot)
        return self.norm(x)[:, None]

    def _through(self, x: Tensor, positions: Tensor, attend_in: Sequence[Attend]) -> Tensor:
        """Vectors (B, T, D) through all blocks and the last norm; every block has its own way to attend."""
        table = self._table(positions)
        again = self.checkpointing and torch.is_grad_enabled()
        for block, attended in zip(self.blocks, attend_in, strict=True):
            x = checkpoint(block, x, table, attended, use_reentrant=False) if again else block(x, table, attended)
        return self.norm(x)

    def _table(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        return None if self.rotary == "none" else rotary_table(positions, self.head_dim)

    def with_null_rows(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Null labels or null features after the given rows; null features are never masked."""
        rows = dict(condition)
        if "labels" in rows:
            rows["labels"] = torch.cat([rows["labels"], torch.full_like(rows["labels"], self.null_label)])
        if "cond" in rows and self.condition is not None:
            null = self.condition.null_features.to(rows["cond"].dtype).expand_as(rows["cond"])
            rows["cond"] = torch.cat([rows["cond"], null])
        if "cond_mask" in rows:
            rows["cond_mask"] = torch.cat([rows["cond_mask"], torch.ones_like(rows["cond_mask"])])
        return rows

    def new_cache(self, batch_size: int, max_seq_len: int | None = None, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for prefix and tokens."""
        slots = self.prefix_len + (max_seq_len or self.spec.seq_len)
        like = self.norm.weight.detach().to(dtype or self.norm.weight.dtype)
        return new_cache(len(self.blocks), batch_size, self.num_kv_heads, slots, self.head_dim, like)


class LlamaBlock(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm and added to the stream; no biases.

    Args:
        dim: width D.
        num_heads: query heads.
        num_kv_heads: key-value heads.
        dropout: on the output of both branches.
    """

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim, eps=NORM_EPS), nn.RMSNorm(dim, eps=NORM_EPS)
        self.qkv = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp = SwiGLU(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor] | None, attended: Attend) -> Tensor:
        """(B, T, D) to (B, T, D); `attended` takes queries, keys and values of this layer, (B, N, T, E) each."""
        heads = self.qkv(self.attention_norm(x)).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # (B, N, T, E)
        turned, values = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        queries, keys = apply_rotary(turned, table).split([self.num_heads, self.num_kv_heads], dim=1)
        mixed = attended(queries, keys, values).transpose(1, 2).reshape(x.shape).to(x.dtype)
        if self.training:
            x = x + self.dropout(self.out(mixed))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        x = add_linear(self.out, mixed, x)
        return self.mlp(self.mlp_norm(x), x)

    def fused_serves(self, x: Tensor) -> bool:
        """True when `fused_step` is the way to go for vectors (B, D)."""
        products = (self.qkv, self.out, self.mlp.gate_up, self.mlp.down)
        return fused_block.serves_heads(x, self.head_dim) and all(weights_of(one) is not None for one in products)

    def fused_step(self, x: Tensor, table: fused_block.Table, slot: DeviceSlot) -> Tensor:
        """`forward` of one new token per row in few kernels, (B, D) to (B, D)."""
        norm, mlp, kernels = self.attention_norm, self.mlp, fused_block
        qkv, out, gate_up, down = (weights_of(one) for one in (self.qkv, self.out, mlp.gate_up, mlp.down))
        assert qkv and out and gate_up and down
        queries = kernels.norm_qkv(x, norm.weight, NORM_EPS, qkv, table, slot)
        mixed = decode_attention(queries, slot.keys, slot.values, slot.ends).flatten(1)
        x = kernels.linear(mixed, out, x)
        hidden = kernels.norm_swiglu(x, self.mlp_norm.weight, NORM_EPS, gate_up)
        return kernels.linear(hidden, down, x)


class FeatureCondition(nn.Module):
    """Project external features, for instance of a text encoder; dropped samples get learned features instead.

    Args:
        cond_dim: width of the features.
        cond_len: number of vectors S.
        dim: width D.
    """

    def __init__(self, cond_dim: int, cond_len: int, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(cond_dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.null_features = nn.Parameter(torch.randn(cond_len, cond_dim) / cond_dim**0.5)

    def forward(self, cond: Tensor | None, drop: Tensor) -> Tensor:
        """Vectors (B, S, D) of features (B, S, C); `drop` (B,) marks samples without condition, None means all."""
        if cond is None:
            cond = self.null_features.expand(drop.shape[0], -1, -1)
        cond = torch.where(drop[:, None, None], self.null_features.to(cond.dtype), cond)
        return self.fc2(F.gelu(self.fc1(cond), approximate="tanh"))


def init_weights(module: nn.Module) -> None:
    """Normal weights of std 0.02, zero biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
