"""Previews come in order, whole, and with what was written when their group was complete."""

from __future__ import annotations

import pytest
import torch

from vision_ar.sampler.overlap import PreviewQueue
from vision_ar.tokenizers.diffusion import DiffusionTokenizer


def groups(tokenizer: DiffusionTokenizer, device: str) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    ids = torch.randint(16, (3, 8), generator=torch.Generator().manual_seed(0)).to(device)
    ends = tokenizer.spec.ends
    return ids, list(zip((0, *ends), ends, strict=False))


def check_queue(device: str) -> None:
    torch.manual_seed(0)
    tokenizer = DiffusionTokenizer.tiny().eval().to(device)
    ids, spans = groups(tokenizer, device)
    queue, plain = PreviewQueue(tokenizer.open_preview(3), torch.device(device)), tokenizer.open_preview(3)
    found = []
    with torch.inference_mode():
        wanted = [plain.feed(ids[:, start:end]) for start, end in spans]
        for start, end in spans:
            queue.feed(start, ids, end)
            found += list(queue.ready())
        found += list(queue.ready(wait=True))
    assert [shown.written for shown in found] == [end for _, end in spans]
    assert all(torch.equal(shown.ids, ids) for shown in found)
    torch.testing.assert_close([shown.images for shown in found], wanted)
    assert list(queue.ready(wait=True)) == []


def test_previews_of_a_cpu_are_ready_at_once() -> None:
    check_queue("cpu")
    torch.manual_seed(0)
    tokenizer = DiffusionTokenizer.tiny().eval()
    ids, (first, *_) = groups(tokenizer, "cpu")
    queue = PreviewQueue(tokenizer.open_preview(3), torch.device("cpu"))
    with torch.inference_mode():
        queue.feed(first[0], ids, first[1])
    assert len(list(queue.ready())) == 1


@pytest.mark.gpu
def test_previews_of_a_gpu_come_from_their_own_stream() -> None:
    check_queue("cuda")
