"""The keyed draw in one pass over the logits: noise is made where it is compared, and never written down.

`layers/noise.py` says what the noise is; there its hash is a chain of integer calls, each of which reads and writes as
much as the logits take.
"""

from __future__ import annotations

from torch import Tensor

PART = 1024
"""Ids that one program compares; the best of each part are compared by PyTorch."""


def keyed_argmax(logprobs: Tensor, seeds: Tensor, positions: Tensor, stream: int) -> Tensor:
    """argmax over ids of log p + Gumbel noise, (Q,), int64, the first where several are equal; in Triton.

    Args:
        logprobs: (Q, V), float32.
        seeds: of each row, (Q,), int64.
        positions: likewise.
        stream: of the noise.
    """
    from vision_ar.kernels.keyed_draw_triton import best_of_part

    rows, vocab = logprobs.shape
    parts = -(-vocab // PART)
    scores, ids = logprobs.new_empty(rows, parts), seeds.new_empty(rows, parts)
    best_of_part[(rows, parts)](
        logprobs.contiguous(), seeds.contiguous(), positions.contiguous(), scores, ids, vocab, parts,
        STREAM=stream, PART=PART,
    )  # fmt: skip
    return ids.gather(1, scores.argmax(dim=1, keepdim=True))[:, 0]
