"""The law: filters keep what they say."""

from __future__ import annotations

import pytest
import torch

from vision_ar.sampler.logits import Law, keep_top_p

MANY = 2048


def kept_plainly(row: torch.Tensor, top_p: float) -> list[int]:
    """Ids from the most likely on, smaller ids first, until their sum reaches top_p."""
    probs = row.softmax(dim=-1)
    order = sorted(range(len(row)), key=lambda token: (-float(probs[token]), token))
    before = probs[order].cumsum(0) - probs[order]
    return sorted(token for token, sum_before in zip(order, before.tolist(), strict=True) if sum_before < top_p)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_top_p_keeps_the_likely_tokens_up_to_that_sum(top_p: float, spread: float) -> None:
    logits = spread * torch.randn(3, MANY, generator=torch.Generator().manual_seed(0))
    logits[1] = (logits[1] * 2).round() / 2  # many tokens are equally likely
    logits[2, 7:] = -torch.inf
    found = keep_top_p(logits, top_p)
    for row in range(3):
        assert found[row].isfinite().nonzero().flatten().tolist() == kept_plainly(logits[row], top_p)
    assert torch.equal(found.isfinite() & (found == logits), found.isfinite())


def test_tokens_that_tie_at_the_end_are_kept_by_their_ids() -> None:
    logits = torch.full((1, MANY), -20.0)
    logits[0, [900, 5, 300, 77]] = 0.0  # a quarter each
    kept = keep_top_p(logits, 0.6).isfinite().nonzero()[:, 1].tolist()
    assert kept == [5, 77, 300]


def test_filters_apply_in_the_order_of_the_arguments() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]])
    law = Law(temperature=0.5, top_k=4, top_p=0.99, min_p=0.01)
    tempered = logits / 0.5
    by_k = tempered.masked_fill(tempered < tempered[0, 3], -torch.inf)
    by_p = keep_top_p(by_k, 0.99)
    probs = by_p.softmax(-1)
    expected = by_p.masked_fill(probs < 0.01 * probs.max(), -torch.inf).log_softmax(-1)
    torch.testing.assert_close(law(logits), expected)
