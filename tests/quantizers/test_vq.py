from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import seeded
from vision_ar.quantizers.vq import VectorQuantizer


def make_quantizer(codebook_size: int = 8, latent_dim: int = 4, **settings: int) -> VectorQuantizer:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(codebook_size, latent_dim, **settings)
    with torch.no_grad():  # stored rows need not be of unit length
        quantizer.codebook.mul_(torch.rand(codebook_size, 1, generator=seeded(1)) + 0.5)
    return quantizer


def make_latents(*shape: int, seed: int = 2) -> Tensor:
    return 3 * torch.randn(*shape, generator=seeded(seed))


def unit(vector: list[float]) -> list[float]:
    length = sum(x * x for x in vector) ** 0.5
    return [x / length for x in vector]


def slow_nearest(latent: list[float], rows: list[list[float]]) -> int:
    """Row with the largest cosine, one number at a time."""
    cosines = [sum(a * b for a, b in zip(unit(latent), unit(row), strict=True)) for row in rows]
    return max(range(len(rows)), key=cosines.__getitem__)


def test_the_nearest_row_by_cosine_is_chosen() -> None:
    quantizer, latents = make_quantizer(), make_latents(2, 20, 4)
    tokens = quantizer(latents).tokens
    rows = quantizer.codebook.tolist()
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[slow_nearest(latent, rows) for latent in row] for row in latents.tolist()]


def test_the_lengths_of_latents_and_rows_do_not_matter() -> None:
    quantizer, latents = make_quantizer(), make_latents(2, 20, 4)
    before = quantizer(latents)
    with torch.no_grad():
        quantizer.codebook.mul_(torch.rand(8, 1, generator=seeded(3)) + 0.1)
    after = quantizer(latents * (torch.rand(2, 20, 1, generator=seeded(4)) + 0.1))
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(x, y)


def test_quantized_vectors_are_the_unit_rows_that_lookup_gives() -> None:
    quantizer = make_quantizer()
    found = quantizer(make_latents(2, 20, 4))
    torch.testing.assert_close(found.quantized, quantizer.lookup(found.tokens))
    expected = torch.tensor([unit(row) for row in quantizer.codebook.tolist()])
    torch.testing.assert_close(quantizer.lookup(torch.arange(8)), expected)
    assert quantizer.lookup(torch.zeros(2, 3, 5, dtype=torch.int64)).shape == (2, 3, 5, 4)


def test_tokens_of_codebook_rows_are_their_own() -> None:
    quantizer = make_quantizer(64, 8)
    tokens = torch.randperm(64, generator=seeded(5))[None]
    assert torch.equal(quantizer(quantizer.lookup(tokens)).tokens, tokens)


def test_losses_are_the_mean_squares_of_every_token() -> None:
    quantizer, latents = make_quantizer(), make_latents(2, 5, 4)
    found = quantizer(latents)
    rows = quantizer.codebook.tolist()
    expected = torch.tensor(
        [
            [
                sum((a - b) ** 2 for a, b in zip(unit(latent), unit(rows[token]), strict=True)) / 4
                for latent, token in zip(*pair, strict=True)
            ]
            for pair in zip(latents.tolist(), found.tokens.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(found.codebook_loss, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.commitment_loss, expected, rtol=1e-4, atol=1e-6)


def test_gradients_pass_straight_through_to_the_latents_and_not_to_the_codebook() -> None:
    quantizer, latents = make_quantizer(), make_latents(2, 5, 4).requires_grad_()
    upstream = torch.randn(2, 5, 4, generator=seeded(6))
    quantizer(latents).quantized.backward(upstream)
    (expected,) = torch.autograd.grad(F.normalize(latents, dim=-1), latents, upstream)
    torch.testing.assert_close(latents.grad, expected)
    assert quantizer.codebook.grad is None


def test_each_loss_moves_one_side_only() -> None:
    quantizer, latents = make_quantizer(), make_latents(2, 5, 4).requires_grad_()
    quantizer(latents).codebook_loss.sum().backward()
    assert latents.grad is None and bool(quantizer.codebook.grad.any())
    quantizer.codebook.grad = None
    quantizer(latents).commitment_loss.sum().backward()
    assert bool(latents.grad.any()) and quantizer.codebook.grad is None


def test_descending_both_losses_brings_the_sides_together() -> None:
    quantizer, latents = make_quantizer(), make_latents(1, 6, 4).requires_grad_()
    losses = []
    for _ in range(5):
        found = quantizer(latents)
        losses.append(float(found.codebook_loss.detach().sum()))
        (found.codebook_loss + found.commitment_loss).sum().backward()
        with torch.no_grad():
            for side in (latents, quantizer.codebook):
                side -= 0.5 * side.grad
                side.grad = None
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]


def test_autocast_decides_no_near_tie() -> None:
    quantizer, latents = make_quantizer(512, 8), make_latents(4, 256, 8)
    plain = quantizer(latents)
    with torch.autocast("cpu", torch.bfloat16):
        cast = quantizer(latents)
    assert torch.equal(plain.tokens, cast.tokens)
    assert cast.codebook_loss.dtype == cast.quantized.dtype == torch.float32


def test_low_precision_latents_are_quantised_in_float32() -> None:
    quantizer, latents = make_quantizer(), make_latents(2, 20, 4).bfloat16()
    assert torch.equal(quantizer(latents).tokens, quantizer(latents.float()).tokens)


def test_quantising_does_not_count_as_use() -> None:
    quantizer = make_quantizer().train()
    quantizer(make_latents(2, 20, 4))
    assert quantizer.usage() == 0.0
    assert quantizer.seen_tokens.tolist() == [0, 0]


def test_usage_is_the_share_of_rows_among_the_last_tokens() -> None:
    quantizer = make_quantizer(8, 4, usage_window=10)
    latents = torch.zeros(6, 4)
    history: list[int] = []
    for batch in ([0, 0, 1, 1, 2, 2], [3, 3, 3, 3, 3, 3], [4, 5, 4, 5, 4, 5], [5] * 6, [5] * 6):
        quantizer.track(torch.tensor(batch), latents)
        history += batch
        assert quantizer.seen_tokens.tolist() == [len(history), len(history) // 6]
        # a batch counts from its end: a row is used while fewer than 10 tokens came after its last batch
        recent = [start for start in range(0, len(history), 6) if len(history) - start - 6 < 10]
        assert quantizer.usage() == len({row for start in recent for row in history[start : start + 6]}) / 8


def test_tokens_of_any_shape_are_tracked() -> None:
    quantizer = make_quantizer()
    quantizer.track(torch.tensor([[[0, 1], [2, 2]]]), torch.zeros(1, 2, 2, 4))
    assert quantizer.seen_tokens.tolist() == [4, 1]
    assert quantizer.usage() == 3 / 8


def revived(seed: int = 7) -> tuple[VectorQuantizer, Tensor, Tensor]:
    """Two batches that use rows 0 to 2 only, the second of which revives; the codebook before and the last latents."""
    quantizer = make_quantizer(revive_every=2)
    before = quantizer.codebook.detach().clone()
    latents = make_latents(2, 9, 4, seed=seed)
    for _ in range(2):
        quantizer.track(torch.arange(18).view(2, 9) % 3, latents)
    return quantizer, before, latents


def test_revival_moves_dead_rows_only_and_onto_latents_of_the_batch() -> None:
    quantizer, before, latents = revived()
    assert torch.equal(quantizer.codebook[:3], before[:3])
    flat = F.normalize(latents.flatten(0, 1), dim=-1)
    evenly = [0, 4, 8, 12, 17]  # 5 of 18, first and last among them
    torch.testing.assert_close(quantizer.codebook[3:].detach(), flat[evenly])


def test_revival_is_deterministic() -> None:
    first, second = revived()[0], revived()[0]
    assert torch.equal(first.codebook, second.codebook) and torch.equal(first.last_used, second.last_used)


def test_revived_rows_are_chosen_for_the_latents_they_moved_to() -> None:
    quantizer, _, latents = revived()
    tokens = quantizer(latents).tokens.flatten()
    assert tokens[[0, 4, 8, 12, 17]].tolist() == [3, 4, 5, 6, 7]


def test_revival_waits_for_its_batch() -> None:
    quantizer = make_quantizer(revive_every=3)
    before = quantizer.codebook.detach().clone()
    for batch in range(1, 4):
        quantizer.track(torch.zeros(1, 4, dtype=torch.int64), make_latents(1, 4, 4))
        assert torch.equal(quantizer.codebook, before) == (batch < 3)


def test_without_revival_the_codebook_is_never_moved() -> None:
    quantizer = make_quantizer()
    before = quantizer.codebook.detach().clone()
    for _ in range(3):
        quantizer.track(torch.zeros(1, 4, dtype=torch.int64), make_latents(1, 4, 4))
    assert torch.equal(quantizer.codebook, before)


@pytest.mark.parametrize(("window", "moving"), [(12, [2, 4, 6]), (13, [2, 6])])
def test_a_revived_row_has_one_window_to_prove_itself(window: int, moving: list[int]) -> None:
    # batches of 6 tokens, a revival after every second one: 12 tokens later the window of 12 is over, that of 13 is not
    quantizer, moved = make_quantizer(usage_window=window, revive_every=2), []
    for batch in range(1, 7):
        before = quantizer.codebook.detach().clone()
        quantizer.track(torch.zeros(1, 6, dtype=torch.int64), make_latents(1, 6, 4, seed=batch))
        moved += [batch] * (not torch.equal(quantizer.codebook, before))
    assert moved == moving


def test_a_codebook_without_dead_rows_stays() -> None:
    quantizer = make_quantizer(revive_every=1)
    before = quantizer.codebook.detach().clone()
    quantizer.track(torch.arange(8)[None], make_latents(1, 8, 4))
    assert torch.equal(quantizer.codebook, before) and quantizer.usage() == 1.0


def test_the_statistics_are_saved_so_that_a_resumed_run_revives_alike() -> None:
    first = make_quantizer(revive_every=2)
    first.track(torch.zeros(1, 4, dtype=torch.int64), make_latents(1, 4, 4))
    second = make_quantizer(revive_every=2)
    second.load_state_dict(first.state_dict())
    for quantizer in (first, second):
        quantizer.track(torch.ones(1, 4, dtype=torch.int64), make_latents(1, 4, 4))
    assert torch.equal(first.codebook, second.codebook) and torch.equal(first.last_used, second.last_used)


def test_tracking_takes_no_gradient() -> None:
    quantizer, latents = make_quantizer(revive_every=1), make_latents(1, 4, 4).requires_grad_()
    quantizer.track(torch.zeros(1, 4, dtype=torch.int64), latents)
    assert quantizer.codebook.grad_fn is None and quantizer.codebook.requires_grad


@pytest.mark.parametrize("rows", [1, 8])
def test_more_dead_rows_than_latents_share_them(rows: int) -> None:
    quantizer = make_quantizer(9, revive_every=1)
    quantizer.track(torch.zeros(1, rows, dtype=torch.int64), make_latents(1, rows, 4))
    assert quantizer.codebook.isfinite().all()
