"""Previews beside the tokens: on a GPU a finished group is decoded while the next one is being written.

Decoding has a CUDA stream of its own, so that its kernels fill what the steps of a small batch leave idle; a preview is
told as soon as it is there. A CPU has no idle cores while it writes, so there it decodes at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vision_ar.interfaces import Preview


class Shown(NamedTuple):
    """A preview, and what was written when its group was complete."""

    images: Tensor | None
    ids: Tensor
    written: int


class PreviewQueue:
    """Decodes groups in order and hands previews out when they are ready.

    Args:
        preview: decodes them.
        device: where tokens and decoder are.
    """

    def __init__(self, preview: Preview, device: torch.device) -> None:
        self._preview, self._device = preview, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._waiting: deque[tuple[Shown, torch.cuda.Event | None]] = deque()

    def feed(self, start: int, ids: Tensor, written: int) -> None:
        """Decode the group from column `start` to `written` of ids (B, T), which must not change any more."""
        if self._stream is None:
            self._waiting.append((Shown(self._preview.feed(ids[:, start:written]), ids, written), None))
            return
        writing = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(writing)
        with torch.cuda.stream(self._stream):
            images = self._preview.feed(ids[:, start:written])
        ids.record_stream(self._stream)
        if images is not None:
            images.record_stream(writing)
        self._waiting.append((Shown(images, ids, written), self._stream.record_event()))

    def ready(self, wait: bool = False) -> Iterator[Shown]:
        """Previews that are finished, in order; all of them when told to wait."""
        while self._waiting:
            shown, event = self._waiting[0]
            if event is not None:
                if not wait and not event.query():
                    return
                event.synchronize()
            self._waiting.popleft()
            yield shown
