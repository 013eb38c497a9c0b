"""Key-value cache with fixed buffers: entries are staged behind each row's committed length, then committed.

What is never committed is free to be overwritten, so rolling back costs nothing. It lives in `layers` because the
streaming decoder of a tokenizer needs it as much as the sampler does.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all layers, (L, B, N, S, E) each.

    Args:
        depth: number of layers L.
        batch_size: rows B.
        num_heads: key-value heads N.
        max_seq_len: slots S per row.
        head_dim: width E.
        like: a tensor whose device and dtype the buffers take.
    """

    def __init__(
        self, depth: int, batch_size: int, num_heads: int, max_seq_len: int, head_dim: int, like: Tensor
    ) -> None:
        shape = (depth, batch_size, num_heads, max_seq_len, head_dim)
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=like.device)
        self.common_length: int | None = 0  # set while all rows are equally long: then slices replace scatters
        self._staged = 0

    @property
    def max_seq_len(self) -> int:
        """Slots per row."""
        return self.keys.shape[3]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stage entries (B, N, T, E) of one layer and return all that may be read, (B, N, S', E) each.

        Raises:
            RuntimeError: if the rows are known to be full.
        """
        new = keys.shape[2]
        self._staged = new
        if self.common_length is not None:
            start, end = self.common_length, self.common_length + new
            if end > self.max_seq_len:
                raise RuntimeError(f"kv_cache must have room for {end} entries, it was made for {self.max_seq_len}")
            self.keys[layer, :, :, start:end] = keys
            self.values[layer, :, :, start:end] = values
            return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        slots = self.lengths[:, None] + torch.arange(new, device=keys.device)
        index = slots[:, None, :, None].expand_as(keys)
        self.keys[layer].scatter_(2, index, keys.to(self.keys.dtype))
        self.values[layer].scatter_(2, index, values.to(self.values.dtype))
        return self.keys[layer], self.values[layer]

    def visible(self, new: int, staged_mask: Tensor | None = None) -> Tensor | None:
        """Who of `new` staged entries may see what `append` returns, (B or 1, new, S'); None when all may see all.

        Args:
            new: number of entries about to be staged, T.
            staged_mask: (B or 1, T, T), True may attend, among the staged entries; None means causal.
        """
        device = self.keys.device
        if self.common_length is not None:
            if new == 1 and staged_mask is None:
                return None
            if staged_mask is None:
                staged_mask = torch.ones(1, new, new, dtype=torch.bool, device=device).tril()
            seen = staged_mask.new_ones(staged_mask.shape[0], new, self.common_length)
            return torch.cat([seen, staged_mask], dim=-1)
        if staged_mask is None:
            staged_mask = torch.ones(1, new, new, dtype=torch.bool, device=device).tril()
        offset = torch.arange(self.max_seq_len, device=device) - self.lengths[:, None]  # (B, S), < 0 is committed
        inside = ((offset >= 0) & (offset < new))[:, None]
        index = offset.clamp(0, new - 1)[:, None].expand(-1, new, -1)
        staged = staged_mask.expand(offset.shape[0], -1, -1).gather(2, index)
        return (offset < 0)[:, None] | (inside & staged)

    def commit(self, kept: Tensor | None = None, counts: Tensor | None = None) -> None:
        """Make staged entries permanent.

        Args:
            kept: staged entries to keep in order, (B, A), row b uses its first counts[b]; None keeps all of all rows.
            counts: entries kept per row, (B,); with `kept` only.
        """
        if kept is None or counts is None:
            self.lengths += self._staged
            if self.common_length is not None:
                self.common_length += self._staged
            return
        rows = torch.arange(kept.shape[0], device=kept.device)[:, None]
        # rows may near capacity: what would fall outside is not kept anyway, so clamp instead of growing
        source = (self.lengths[:, None] + kept).clamp(max=self.max_seq_len - 1)
        slots = self.lengths[:, None] + torch.arange(kept.shape[1], device=kept.device)
        slots = slots.clamp(max=self.max_seq_len - 1)
        for buffer in (self.keys, self.values):
            buffer[:, rows, :, slots] = buffer[:, rows, :, source].clone()
        self.set_lengths(self.lengths + counts)

    def set_lengths(self, lengths: Tensor) -> None:
        """Say how many entries of each row count, (B,): roll back, or let rows differ."""
        self.lengths = lengths.clone()
        self.common_length = None

    def select(self, rows: Tensor) -> None:
        """Keep these rows only, in this order, (B',); repeats fork a row."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths = self.lengths[rows]
