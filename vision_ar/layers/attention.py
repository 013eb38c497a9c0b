"""From an `AttentionPattern` to a kernel call: the only place where masks are made.

Three facts hold everywhere: attention tensors are (B, N, T, E), caches are (B, N, S, E), and rotary embedding turns
neighbouring pairs (2i, 2i + 1) of E.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from vision_ar.interfaces import AttentionPattern
from vision_ar.layers.kv_cache import ColumnCache, KVCache

logger = logging.getLogger(__name__)

SHORT = 128
"""Queries up to which two matrix products and a softmax train faster on a CPU than the fused kernel and its backward:
142 against 129 images/s with PyTorch's own unfused kernel, for the 32-token tokenizer of the bundled model with heads
of 32 and 16, 2 cores (AMD EPYC, bf16, one run)."""


class Allowed(NamedTuple):
    """A pattern made ready for `attend`: at most one of the three is set; none means everyone sees everyone."""

    causal: bool = False
    mask: Tensor | None = None
    """(B or 1, 1, T, S): booleans, True may attend, or what is added to the scores."""
    block_mask: Any = None
    """A FlexAttention block mask."""


def token_mask(pattern: AttentionPattern, seq_len: int, device: torch.device | str) -> Tensor:
    """The pattern over tokens alone as booleans, (B or 1, T, T), True may attend."""
    index = torch.arange(seq_len, device=device)
    causal = (index[None, :] <= index[:, None])[None]
    if pattern.kind == "causal":
        return causal
    if pattern.kind == "full":
        return torch.ones_like(causal)
    if pattern.kind == "prefix":
        return causal | (index < pattern.prefix_len)[None, None]
    if pattern.kind == "block":
        group = pattern.group
        assert group is not None  # AttentionPattern checks it
        return group[:, None, :] <= group[:, :, None]
    assert pattern.mask is not None
    if pattern.kind == "visible":
        # a token always sees itself, so that no row is empty
        return pattern.mask[:, None, :] | torch.eye(seq_len, dtype=torch.bool, device=device)[None]
    return pattern.mask


def prefixed_mask(
    pattern: AttentionPattern, seq_len: int, prefix_len: int, device: torch.device | str, cond_mask: Tensor | None
) -> Tensor:
    """The pattern over condition prefix and tokens, (B or 1, P + T, P + T).

    Prefix vectors see each other (causally in a causal pattern, as published models do) and never a token; tokens see
    the prefix. `cond_mask` (B, P) hides padded prefix vectors from everyone but themselves.
    """
    tokens = token_mask(pattern, seq_len, device)
    total = prefix_len + seq_len
    mask = torch.zeros(tokens.shape[0], total, total, dtype=torch.bool, device=device)
    mask[:, :, :prefix_len] = True
    if pattern.kind == "causal":
        mask[:, :prefix_len, :prefix_len] = mask[:, :prefix_len, :prefix_len].tril()
    mask[:, prefix_len:, prefix_len:] = tokens
    if cond_mask is None:
        return mask
    heard = F.pad(cond_mask, (0, seq_len), value=True)[:, None]  # (B, 1, P + T)
    return (mask & heard) | torch.eye(total, dtype=torch.bool, device=device)


def allow(
    pattern: AttentionPattern,
    seq_len: int,
    prefix_len: int,
    device: torch.device | str,
    kv_cache: KVCache | None = None,
    cond_mask: Tensor | None = None,
    flex: bool = False,
) -> Allowed:
    """Prepare a pattern once per forward pass.

    Args:
        pattern: over the tokens.
        seq_len: vectors in this call: prefix and tokens, or only the new ones with a cache.
        prefix_len: how many of them are the condition prefix; 0 with a cache that holds it already.
        device: of the mask.
        kv_cache: if earlier entries are cached.
        cond_mask: True for real condition vectors, (B, P).
        flex: build a FlexAttention block mask instead of booleans.
    """
    if kv_cache is not None and kv_cache.common_length != 0:
        if pattern.kind not in ("causal", "explicit", "full"):
            raise ValueError(f"attention with a kv_cache must be causal, full or explicit, got {pattern.kind!r}")
        staged = None if pattern.kind == "causal" else token_mask(pattern, seq_len, device)
        mask = kv_cache.visible(seq_len, staged)
        if cond_mask is not None:
            seen = kv_cache.common_length + seq_len if mask is None else mask.shape[-1]  # type: ignore[operator]
            heard = F.pad(cond_mask, (0, seen - cond_mask.shape[1]), value=True)[:, None]
            mask = heard if mask is None else mask & heard
        if mask is not None and isinstance(kv_cache, ColumnCache):  # many layers add it to few scores
            mask = torch.zeros(mask.shape, dtype=kv_cache.keys.dtype).masked_fill_(~mask, -torch.inf)
        return Allowed(mask=None if mask is None else mask[:, None])
    if pattern.kind == "causal" and cond_mask is None:
        return Allowed(causal=seq_len > 1)
    if pattern.kind == "full" and cond_mask is None and prefix_len == 0:
        return Allowed()
    mask = prefixed_mask(pattern, seq_len - prefix_len, prefix_len, device, cond_mask)
    if not flex or not flex_works(torch.device(device)):
        return Allowed(mask=mask[:, None])

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[row if mask.shape[0] > 1 else 0, query, key]

    rows = mask.shape[0] if mask.shape[0] > 1 else None
    return Allowed(block_mask=create_block_mask(mask_mod, rows, None, seq_len, seq_len, device=str(device)))


def attend(queries: Tensor, keys: Tensor, values: Tensor, allowed: Allowed) -> Tensor:
    """Attention (B, N, T, E); keys and values may have fewer heads (grouped queries) and longer length."""
    keys, values = keys.to(queries.dtype), values.to(queries.dtype)  # a cache may hold 8 bits
    short = queries.device.type == "cpu" and queries.requires_grad and queries.shape[2] <= SHORT
    by_column = keys.stride(-1) != 1  # see `ColumnCache`
    if (short or by_column) and allowed.block_mask is None:
        return attend_plainly(queries, keys, values, allowed)
    grouped = queries.shape[1] != keys.shape[1]
    if allowed.block_mask is not None:
        flex: Any = flex_attention if queries.device.type == "cpu" else compiled_flex()
        return flex(queries, keys, values, block_mask=allowed.block_mask, enable_gqa=grouped)
    if allowed.causal:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=grouped)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed.mask, enable_gqa=grouped)


def flex_works(device: torch.device) -> bool:
    """False where FlexAttention has no backward and one may be asked for."""
    if device.type != "cpu" or not torch.is_grad_enabled():
        return True
    _say_once("FlexAttention has no backward on a CPU: SDPA with a mask is used")
    return False


@cache
def _say_once(message: str) -> None:
    logger.warning(message)


@cache
def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention as one kernel; uncompiled it would form the whole matrix of scores."""
    return torch.compile(flex_attention, dynamic=False)


def attend_plainly(queries: Tensor, keys: Tensor, values: Tensor, allowed: Allowed) -> Tensor:
    """What `attend` means, written out; every query must be allowed to see something."""
    shared = queries.shape[1] // keys.shape[1]
    if shared > 1:  # grouped queries
        keys, values = keys.repeat_interleave(shared, dim=1), values.repeat_interleave(shared, dim=1)
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)  # (B, N, T, S)
    mask = allowed.mask
    if allowed.causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1).to(values.dtype) @ values
