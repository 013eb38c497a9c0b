"""Attention of one new token per row over its cached keys: the step that a GPU spends its time on at large batches.

`reference` says what is computed, `split` does it in Triton. Both read no more of the cache than each row has, and take
their lengths from the device, so that a captured step needs no word from the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vision_ar.kernels.triton_found import HAS_TRITON

SPLIT = 128
"""Cached entries that one program reads; long rows keep more programs busy, and a second kernel joins their parts."""
BLOCK = 64
"""Entries that are held at a time."""


def decode_attention(queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one query per head, (R, N, E), float32 inside, in the dtype of `queries`.

    Args:
        queries: (R, N, E).
        keys: cache, (R, K, S, E) with K dividing N: query head n reads key head n // (N / K). Any dtype.
        values: likewise.
        lengths: entries of each row that are read, the new one included, (R,), int64, at least 1.
    """
    if queries.is_cuda and HAS_TRITON:
        return split(queries, keys, values, lengths)
    return reference(queries, keys, values, lengths)


def reference(queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """The same, plainly: scores of all slots, those beyond the length removed."""
    rows, kv, slots, width = keys.shape
    grouped = queries.view(rows, kv, -1, width).float()
    scores = grouped @ keys.float().transpose(-1, -2) * width**-0.5  # (R, K, G, S)
    beyond = torch.arange(slots, device=keys.device) >= lengths[:, None]
    probs = scores.masked_fill(beyond[:, None, None], -torch.inf).softmax(dim=-1)
    return (probs @ values.float()).view(rows, -1, width).to(queries.dtype)


def split(queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """The same in Triton: every program reads a part of one head of one row, a second kernel joins the parts."""
    from vision_ar.kernels.decode_attention_triton import join_parts, read_part, triton

    rows, heads, width = queries.shape
    kv, slots = keys.shape[1], keys.shape[2]
    parts = -(-slots // SPLIT)
    queries = queries.contiguous()
    sums = queries.new_empty(rows, heads, parts, width, dtype=torch.float32)
    stats = queries.new_empty(rows, heads, parts, 2, dtype=torch.float32)
    out = torch.empty_like(queries)
    padded = triton.next_power_of_2(width)
    read_part[(rows * heads, parts)](
        queries, keys, values, lengths, sums, stats, width**-0.5, heads, heads // kv, width,
        *keys.stride()[:3], *values.stride()[:3], parts, SPLIT=SPLIT, BLOCK=BLOCK, WIDTH=padded,
    )  # fmt: skip
    join_parts[(rows * heads,)](sums, stats, lengths, out, heads, width, parts, SPLIT=SPLIT, WIDTH=padded)
    return out
