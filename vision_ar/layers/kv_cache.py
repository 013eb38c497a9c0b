"""Key-value caches: entries are staged behind each row's committed length, then committed.

What is never committed is free to be overwritten, so rolling back costs nothing. It lives in `layers` because the
streaming decoder of a tokenizer needs it as much as the sampler does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_ar.kernels.decode_attention import decode_attention


class KVCache:
    """Keys and values of all layers in fixed buffers, (L, B, N, S, E) each.

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
        self.max_seq_len = max_seq_len
        self.keys, self.values = self._buffers(like, (depth, batch_size, num_heads, max_seq_len, head_dim))
        self.full_bytes = 2 * depth * batch_size * num_heads * max_seq_len * head_dim * like.element_size()
        """What both buffers take when every slot is there."""
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=like.device)
        self.common_length: int | None = 0  # set while all rows are equally long: then slices replace scatters
        self._staged = 0

    @staticmethod
    def _buffers(like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return like.new_zeros(shape), like.new_zeros(shape)

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
            self._make_room(end)
            self.keys[layer, :, :, start:end] = held(keys, self.keys.dtype)
            self.values[layer, :, :, start:end] = held(values, self.values.dtype)
            return self._readable(layer, end)
        slots = self.lengths[:, None] + torch.arange(new, device=keys.device)
        index = slots[:, None, :, None].expand_as(keys)
        put(self.keys[layer], index, keys)
        put(self.values[layer], index, values)
        return self.keys[layer], self.values[layer]

    def _make_room(self, end: int) -> None:
        """Have slots for so many entries of a row."""

    def _readable(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """The first entries of all rows, while they are equally long."""
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def device_slots(self) -> list[DeviceSlot]:
        """Where the next entry of every row goes in every layer, by `lengths` on the device; see `DeviceSlot`."""
        ends = self.lengths + 1
        return [DeviceSlot(*pair, self.lengths, ends) for pair in zip(self.keys, self.values, strict=True)]

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
        offset = torch.arange(self.keys.shape[3], device=device) - self.lengths[:, None]  # (B, S), < 0 is committed
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
        self.lengths.copy_(lengths)  # in place: a captured step reads it
        self.common_length = None

    def restart(self) -> None:
        """Forget all entries; buffers stay where they are."""
        self.lengths.zero_()
        self.common_length, self._staged = 0, 0

    def select(self, rows: Tensor) -> None:
        """Keep these rows only, in this order, (B',); repeats fork a row."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths = self.lengths[rows]


class ColumnCache(KVCache):
    """The same for a CPU: keys lie by column, and buffers grow, so that what is read is always one piece of memory.

    One query then meets all keys in two plain products. 24 heads of 64 over 256 keys take 60 us in bfloat16 and 79 us
    in float32, against 277 and 80 us in PyTorch's fused kernel; 192 heads 0.31 and 0.64 ms against 2.2 and 0.89 ms
    (2 cores of an AMD EPYC). Slots that are not filled yet are masked.
    """

    GROWTH = 64
    """Slots that are added at a time."""

    @staticmethod
    def _buffers(like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        *outer, _, head_dim = shape
        return like.new_zeros(*outer, head_dim, 0).transpose(-1, -2), like.new_zeros(*outer, 0, head_dim)

    def _make_room(self, end: int) -> None:
        have = self.keys.shape[3]
        if end > have:
            more = min(self.max_seq_len, self.GROWTH * -(-end // self.GROWTH)) - have
            self.keys = F.pad(self.keys.transpose(-1, -2), (0, more)).transpose(-1, -2)
            self.values = F.pad(self.values, (0, 0, 0, more))

    def _readable(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer], self.values[layer]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As above, but all slots there are, with those not filled yet; `visible` masks them."""
        readable = super().append(layer, keys, values)
        if self.common_length == 0:  # the start of a sequence is read without a mask
            return keys.to(self.keys.dtype), values.to(self.values.dtype)
        return readable

    def visible(self, new: int, staged_mask: Tensor | None = None) -> Tensor | None:
        """As above, for all slots there are."""
        if self.common_length is None:
            return super().visible(new, staged_mask)
        end = self.common_length + new
        if end > self.max_seq_len:
            raise RuntimeError(f"kv_cache must have room for {end} entries, it was made for {self.max_seq_len}")
        self._make_room(end)
        seen = super().visible(new, staged_mask)
        if seen is None:
            seen = torch.ones(1, new, end, dtype=torch.bool)
        return F.pad(seen, (0, self.keys.shape[3] - end))

    def stage_one(self, mask: Tensor) -> list[ColumnSlot]:
        """Stage one entry of every row, equally long rows that have room: where it goes in every layer.

        Args:
            mask: from `visible`, as it is added to scores, (1 or B, 1, S).
        """
        assert self.common_length is not None
        self._staged = 1
        self._make_room(self.common_length + 1)
        if len(mask) > 1:
            mask = mask.repeat_interleave(self.keys.shape[2], dim=0)
        columns = self.keys.transpose(-1, -2)
        pairs = zip(columns, self.values, strict=True)
        return [ColumnSlot(keys, values, self.common_length, mask) for keys, values in pairs]

    def select(self, rows: Tensor) -> None:
        """As above."""
        super().select(rows)
        self.keys = self.keys.transpose(-1, -2).contiguous().transpose(-1, -2)

    def set_lengths(self, lengths: Tensor) -> None:
        """As above; buffers of rows of different length have all slots."""
        self._make_room(self.max_seq_len)
        super().set_lengths(lengths)


class ColumnSlot(NamedTuple):
    """Where the newest entry of every row of one layer of a `ColumnCache` goes."""

    columns: Tensor
    """Keys by column, (B, K, E, S)."""
    values: Tensor
    """(B, K, S, E)."""
    slot: int
    mask: Tensor
    """Added to the scores, (1 or B K, 1, S)."""

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Write one entry per row and read all, (B, N, 1, E), in the dtype of the cache.

        Args:
            queries: (B, N, 1, E), K dividing N.
            keys: (B, K, 1, E).
            values: (B, K, 1, E).
        """
        batch, kv, width, _ = self.columns.shape
        self.columns[..., self.slot].copy_(keys[:, :, 0])
        self.values[:, :, self.slot].copy_(values[:, :, 0])
        queries = queries.reshape(batch * kv, -1, width).to(self.values.dtype)
        scores = torch.baddbmm(self.mask, queries, self.columns.flatten(0, 1), alpha=width**-0.5)
        return torch.bmm(scores.softmax(dim=-1), self.values.flatten(0, 1)).view(batch, -1, 1, width)


class DeviceSlot(NamedTuple):
    """The same for fixed buffers, with nothing decided on the host: the slot of a row is its length on the device."""

    keys: Tensor
    """(B, K, S, E)."""
    values: Tensor
    lengths: Tensor
    """Committed entries of each row, (B,)."""
    ends: Tensor
    """One more: what is read."""

    def write(self, keys: Tensor, values: Tensor) -> None:
        """One entry of every row, (B, K, 1, E) each."""
        batch, kv, _, width = self.keys.shape
        index = self.lengths[:, None, None, None].expand(batch, kv, 1, width)
        put(self.keys, index, keys)
        put(self.values, index, values)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As `ColumnSlot.attend`; rows may have different lengths."""
        self.write(keys, values)
        return decode_attention(queries[:, :, 0], self.keys, self.values, self.ends)[:, :, None]


def held(entries: Tensor, dtype: torch.dtype) -> Tensor:
    """Entries as a cache of this dtype holds them; 8 bits have no infinity, what is too large becomes the largest."""
    if dtype.itemsize == 1 and entries.dtype != dtype:
        largest = torch.finfo(dtype).max
        entries = entries.clamp(-largest, largest)
    return entries.to(dtype)


def put(buffer: Tensor, index: Tensor, entries: Tensor) -> None:
    """Scatter entries along the slots, in the dtype of the buffer."""
    entries = held(entries, buffer.dtype)
    if buffer.dtype.itemsize == 1:  # there is no scatter of 8-bit floats, but of their bits
        buffer, entries = buffer.view(torch.uint8), entries.view(torch.uint8)
    buffer.scatter_(2, index, entries)


def new_cache(depth: int, batch_size: int, num_heads: int, max_seq_len: int, head_dim: int, like: Tensor) -> KVCache:
    """The cache for device and dtype of `like`; arguments as for `KVCache`. 8 bits lie in fixed buffers everywhere."""
    kind = ColumnCache if like.device.type == "cpu" and like.dtype.itemsize > 1 else KVCache
    return kind(depth, batch_size, num_heads, max_seq_len, head_dim, like)
