from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import seeded
from vision_ar.interfaces import Tokens
from vision_ar.layers import perceptual
from vision_ar.layers.classifier import load_classifier
from vision_ar.layers.noise import keyed_normal
from vision_ar.layers.velocity import VelocityConfig
from vision_ar.tokenizers.diffusion import (
    Anchor,
    CoderConfig,
    DiffusionPreview,
    DiffusionTokenizer,
    FlowConfig,
    LossConfig,
    PatchEncoder,
)

STD, SHIFT = 0.6, 2.0
SEEDS = torch.tensor([7, 8, 7])


def make_tokenizer(**settings: Any) -> DiffusionTokenizer:
    """8 x 8 pixels, 8 tokens; layers that start at zero get weights, so that every input matters."""
    torch.manual_seed(0)
    coder = CoderConfig(dim=32, depth=2, head_dim=16, patch_size=4, gate_init=0.5)
    sizes: dict[str, Any] = {
        "image_size": 8,
        "seq_len": 8,
        "num_groups": 4,
        "vocab_size": 16,
        "latent_dim": 4,
        "encoder": coder,
        "decoder": coder,
        "velocity": VelocityConfig(dim=32, depth=2, patch_size=4, head_dim=16),
    }
    tokenizer = DiffusionTokenizer(**sizes | settings)
    for block in tokenizer.velocity.blocks:
        torch.nn.init.normal_(block.modulation.weight, std=0.3)
    torch.nn.init.normal_(tokenizer.velocity.conv_out.weight, std=0.3)
    return tokenizer.eval()


def make_images(count: int = 3, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=seeded(seed)) * 2 - 1


def make_ids(count: int = 3, seed: int = 2) -> Tensor:
    return torch.randint(16, (count, 8), generator=seeded(seed))


def decode(tokenizer: DiffusionTokenizer, ids: Tensor, seeds: Tensor | None = SEEDS) -> Tensor:
    with torch.no_grad():
        return tokenizer.decode(Tokens.of(tokenizer.spec, ids=ids), seeds)


def feed_all(tokenizer: DiffusionTokenizer, ids: Tensor, seeds: Tensor | None = SEEDS) -> list[Tensor | None]:
    preview = tokenizer.open_preview(ids.shape[0], seeds)
    with torch.no_grad():
        return [preview.feed(part) for part in ids.split(list(tokenizer.spec.groups), dim=1)]


def slow_decode(tokenizer: DiffusionTokenizer, ids: Tensor, seed: int, steps: int, second_order: bool) -> list[Tensor]:
    """One image by the formulas, with the states' straight continuation to t = 1 after every step."""
    groups, shift = len(tokenizer.spec.groups), tokenizer.flow.decoding_shift or SHIFT
    times = [u / (u + shift * (1 - u)) for u in (i / steps for i in range(steps + 1))]
    cond = tokenizer.decoder(tokenizer.quantizer.lookup(ids[None])).split(tokenizer.spec.groups, dim=1)
    x, previous, shown = keyed_normal(torch.tensor([seed]), (3, 8, 8)), None, []
    for i in range(steps):
        group = min(math.floor(groups * i / steps + 0.5), groups - 1)
        velocity = tokenizer.velocity(x, torch.tensor([times[i]]), cond[group])
        slope = 1.5 * velocity - 0.5 * previous if second_order and previous is not None else velocity
        shown.append((x + (1 - times[i]) * slope) / STD)
        x, previous = x + (times[i + 1] - times[i]) * slope, velocity
    return shown


@pytest.mark.parametrize("solver", ["ab2", "euler"])
@pytest.mark.parametrize(
    ("num_groups", "num_steps", "steps", "last_step_of"),
    [
        (8, None, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (4, 4, 4, [0, 1, 2, 3]),
        (4, 8, 8, [0, 2, 4, 7]),
        (1, None, 8, [7]),
        (4, 2, 2, [0, 0, 1, 1]),
    ],
)
def test_decoding_and_previews_equal_the_formulas(num_groups, num_steps, steps, last_step_of, solver: str) -> None:
    tokenizer = make_tokenizer(num_groups=num_groups, flow=FlowConfig(num_steps=num_steps, solver=solver))
    ids = make_ids()
    with torch.no_grad():
        rows = [slow_decode(tokenizer, *pair, steps, solver == "ab2") for pair in zip(ids, SEEDS.tolist(), strict=True)]
    expected = [torch.cat(step) for step in zip(*rows, strict=True)]
    torch.testing.assert_close(decode(tokenizer, ids), expected[-1], rtol=1e-4, atol=1e-5)
    shown = feed_all(tokenizer, ids)
    for image, step in zip(shown, last_step_of, strict=True):
        torch.testing.assert_close(image, expected[step], rtol=1e-4, atol=1e-5)


def test_every_group_costs_one_call_of_the_velocity_net_when_there_are_as_many_steps() -> None:
    tokenizer, calls = make_tokenizer(flow=FlowConfig(num_steps=4)), []
    tokenizer.velocity.register_forward_hook(lambda *_: calls.append(1))
    preview, counts = tokenizer.open_preview(3), []
    for part in make_ids().split(2, dim=1):
        preview.feed(part)
        counts.append(len(calls))
    assert counts == [1, 2, 3, 4]


def test_a_single_group_is_decoded_in_eight_steps() -> None:
    tokenizer, calls = make_tokenizer(num_groups=1), []
    tokenizer.velocity.register_forward_hook(lambda *_: calls.append(1))
    decode(tokenizer, make_ids())
    assert len(calls) == 8


@pytest.mark.parametrize("flow", [FlowConfig(), FlowConfig(decoding_shift=4.0, num_steps=3, solver="euler")])
def test_groups_of_unequal_size_and_another_shift_decode_as_the_formulas_say(flow: FlowConfig) -> None:
    tokenizer, ids = make_tokenizer(group_sizes=[1, 2, 5], flow=flow), make_ids()
    steps = flow.num_steps or 8
    with torch.no_grad():
        rows = [
            slow_decode(tokenizer, *pair, steps, flow.solver == "ab2") for pair in zip(ids, SEEDS.tolist(), strict=True)
        ]
    expected = [torch.cat(step) for step in zip(*rows, strict=True)]
    torch.testing.assert_close(decode(tokenizer, ids), expected[-1], rtol=1e-4, atol=1e-5)
    last_step_of = [0, 1, 2] if steps == 3 else [1, 3, 7]
    for image, step in zip(feed_all(tokenizer, ids), last_step_of, strict=True):
        torch.testing.assert_close(image, expected[step], rtol=1e-4, atol=1e-5)


def test_the_shift_of_decoding_is_not_that_of_training() -> None:
    images, noise, raw = make_images(2), torch.zeros(2, 3, 8, 8), torch.tensor([0.3, 0.6])
    plain, shifted = make_tokenizer(), make_tokenizer(flow=FlowConfig(decoding_shift=5.0))
    assert torch.equal(*(t.pass_at(images, raw, noise).losses["loss"] for t in (plain, shifted)))
    assert not torch.allclose(decode(plain, make_ids()), decode(shifted, make_ids()))


def test_a_preview_depends_on_the_tokens_so_far_only() -> None:
    tokenizer, ids = make_tokenizer(), make_ids()
    other = torch.cat([ids[:, :4], 15 - ids[:, 4:]], dim=1)
    first, second = feed_all(tokenizer, ids), feed_all(tokenizer, other)
    assert [torch.equal(*pair) for pair in zip(first, second, strict=True)] == [True, True, False, False]


def test_a_prefix_of_the_tokens_fixes_a_prefix_of_the_condition() -> None:
    tokenizer, ids = make_tokenizer(), make_ids()
    with torch.no_grad():
        before = tokenizer.decoder(tokenizer.quantizer.lookup(ids))
        for length in range(1, 8):
            other = torch.cat([ids[:, :length], 15 - ids[:, length:]], dim=1)
            after = tokenizer.decoder(tokenizer.quantizer.lookup(other))
            torch.testing.assert_close(after[:, :length], before[:, :length], rtol=1e-5, atol=1e-5)
            assert not torch.allclose(after[:, length], before[:, length], atol=1e-3)


@pytest.mark.parametrize("sizes", [[1] * 8, [3, 1, 4], [8]])
def test_the_causal_decoder_gives_the_same_in_parts(sizes: list[int]) -> None:
    tokenizer = make_tokenizer()
    rows = tokenizer.quantizer.lookup(make_ids())
    with torch.no_grad():
        whole, cache = tokenizer.decoder(rows), tokenizer.decoder.new_cache(3)
        parts = [tokenizer.decoder(part, cache) for part in rows.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_latents_see_the_image_and_earlier_queries_only() -> None:
    encoder, images = make_tokenizer().encoder, make_images()
    with torch.no_grad():
        before = encoder(images)
        encoder.query_table[4] += 1
        after = encoder(images)
        changed_image = encoder(images.flip(-1))
    torch.testing.assert_close(after[:, :4], before[:, :4], rtol=1e-5, atol=1e-5)
    for query in (4, 5, 7):
        assert not torch.allclose(after[:, query], before[:, query], atol=1e-4)
    assert not torch.isclose(changed_image, before, atol=1e-5).all(dim=-1).any()


def test_fewer_queries_give_a_prefix_of_the_latents() -> None:
    encoder, images = make_tokenizer().encoder, make_images()
    short = PatchEncoder(encoder.config, 8, 3, 5, 4)
    short.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(short(images), encoder(images)[:, :5], rtol=1e-5, atol=1e-5)


def test_a_sample_depends_on_its_own_tokens_and_seed_only() -> None:
    tokenizer, ids = make_tokenizer(), make_ids()
    together = decode(tokenizer, ids)
    for row in range(3):
        alone = decode(tokenizer, ids[row : row + 1], SEEDS[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-5, atol=1e-5)
    assert torch.equal(decode(tokenizer, ids), together)
    same = decode(tokenizer, ids[:1].expand(3, -1))
    torch.testing.assert_close(same[0], same[2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(same[0], same[1], atol=1e-2)


def test_no_seeds_mean_seed_zero_for_every_row() -> None:
    tokenizer, ids = make_tokenizer(), make_ids()
    assert torch.equal(decode(tokenizer, ids, None), decode(tokenizer, ids, torch.zeros(3, dtype=torch.int64)))
    assert torch.equal(tokenizer.start_noise(2, None)[0], tokenizer.start_noise(2, None)[1])


def test_encoding_is_deterministic_keeps_labels_and_takes_no_gradient() -> None:
    tokenizer, images = make_tokenizer().train(), make_images()
    tokens = tokenizer.encode(images, torch.tensor([4, 5, 6]))
    assert torch.equal(tokens.ids, tokenizer.encode(images).ids)
    assert torch.equal(tokens.ids, tokenizer.eval().encode(images).ids)
    assert tokens.labels.tolist() == [4, 5, 6]
    assert tokens.group[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert tokenizer.quantizer.usage() == 0.0  # only training losses count


def test_fine_to_coarse_emits_the_groups_in_reverse_and_decodes_to_the_same_image() -> None:
    forward, backward, images = make_tokenizer(), make_tokenizer(fine_to_coarse=True), make_images()
    coarse, fine = forward.encode(images).ids, backward.encode(images).ids
    assert torch.equal(fine, coarse.view(3, 4, 2).flip(1).flatten(1))
    assert not torch.equal(fine, coarse)
    whole = decode(forward, coarse)
    torch.testing.assert_close(decode(backward, fine), whole)
    shown = feed_all(backward, fine)
    assert shown[:3] == [None, None, None]
    torch.testing.assert_close(shown[3], whole, rtol=1e-5, atol=1e-5)


def test_fine_to_coarse_with_groups_of_unequal_size() -> None:
    sizes, images = [1, 2, 5], make_images()
    forward, backward = make_tokenizer(group_sizes=sizes), make_tokenizer(group_sizes=sizes, fine_to_coarse=True)
    assert (forward.spec.groups, backward.spec.groups) == ((1, 2, 5), (5, 2, 1))
    coarse, fine = forward.encode(images).ids, backward.encode(images).ids
    assert torch.equal(fine, torch.cat([coarse[:, 3:], coarse[:, 1:3], coarse[:, :1]], dim=1))
    whole = decode(forward, coarse)
    torch.testing.assert_close(decode(backward, fine), whole)
    torch.testing.assert_close(feed_all(backward, fine)[2], whole, rtol=1e-5, atol=1e-5)


def slow_losses(tokenizer: DiffusionTokenizer, images: Tensor, raw: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """The losses one image and one token at a time; a token counts when its group is known at the image's time."""
    flow, quantising, groups = [], [], len(tokenizer.spec.groups)
    found = tokenizer.quantizer(tokenizer.encoder(images))
    cond = tokenizer.decoder(found.quantized)
    ends = tokenizer.spec.ends
    for row, u in enumerate(raw.tolist()):
        group = min(math.floor(groups * u + 0.5), groups - 1)
        t = u / (u + SHIFT * (1 - u))
        noisy = t * STD * images[row] + (1 - t) * noise[row]
        part = cond[row : row + 1, (0, *ends)[group] : ends[group]]
        velocity = tokenizer.velocity(noisy[None], torch.tensor([t]), part)[0]
        flow.append((velocity - (STD * images[row] - noise[row])).square().mean() / STD**2)
        quantising += [found.codebook_loss[row, token] for token in range(ends[group])]
    quantising_loss = torch.stack(quantising).mean()
    return {"flow": torch.stack(flow).mean(), "codebook": quantising_loss, "commitment": quantising_loss}


@pytest.mark.parametrize("groups", [{"num_groups": 1}, {"num_groups": 4}, {"group_sizes": [1, 2, 5]}])
def test_training_losses_equal_a_loop_over_images_and_known_tokens(groups: dict[str, Any]) -> None:
    tokenizer = make_tokenizer(**groups, losses=LossConfig(codebook=0.7, commitment=0.3))
    images, noise = make_images(4), torch.randn(4, 3, 8, 8, generator=seeded(3))
    raw = torch.tensor([0.0, 0.2, 0.5, 0.99])
    with torch.no_grad():
        found = tokenizer.pass_at(images, raw, noise).losses
        expected = slow_losses(tokenizer, images, raw, noise)
    expected["loss"] = expected["flow"] + 0.7 * expected["codebook"] + 0.3 * expected["commitment"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_tokens_that_are_not_known_yet_do_not_enter_the_losses() -> None:
    tokenizer, images = make_tokenizer(), make_images(1)
    taken: list[Tensor] = []
    tokenizer.encoder.register_forward_hook(lambda _module, _inputs, latents: taken.append(latents))
    for raw, known in ((0.0, 2), (0.2, 4), (0.4, 6), (0.99, 8)):
        taken.clear()
        losses = tokenizer.pass_at(images, torch.tensor([raw]), torch.zeros(1, 3, 8, 8)).losses
        (gradient,) = torch.autograd.grad(losses["loss"], taken[0])
        assert gradient.abs().sum(dim=-1)[0].gt(0).tolist() == [True] * known + [False] * (8 - known)


def test_losses_are_the_same_in_both_modes_and_only_training_counts_usage() -> None:
    tokenizer, images = make_tokenizer(), make_images()
    with torch.no_grad():
        first = tokenizer.training_losses(images, seeded(4))
        assert tokenizer.quantizer.usage() == 0.0
        second = tokenizer.train().training_losses(images, seeded(4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    used = tokenizer.encode(images).ids.unique().numel()
    assert tokenizer.quantizer.usage() == pytest.approx(used / 16)


def test_training_draws_come_from_the_generator() -> None:
    tokenizer, images = make_tokenizer(), make_images()
    with torch.no_grad():
        first, second, third = (float(tokenizer.training_losses(images, seeded(s))["loss"]) for s in (4, 4, 5))
    assert first == second != third


def test_every_weight_is_trained() -> None:
    tokenizer = make_tokenizer().train()
    tokenizer.training_losses(make_images(16), seeded(0))["loss"].backward()
    still = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_as_published_the_blocks_start_as_the_identity_and_the_velocity_at_zero() -> None:
    tokenizer = DiffusionTokenizer.tiny()
    assert CoderConfig().gate_init == 0.0
    x = torch.randn(2, 3, 8, 8, generator=seeded(0))
    assert torch.equal(tokenizer.velocity(x, torch.tensor([0.1, 0.9]), torch.ones(2, 2, 32)), torch.zeros(2, 3, 8, 8))


def test_revival_is_off_unless_asked_for() -> None:
    assert make_tokenizer().quantizer.revive_every == 0
    assert make_tokenizer(losses=LossConfig(revive_every=3)).quantizer.revive_every == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_groups": 3}, "num_groups must divide seq_len=8, got 3"),
        ({"num_groups": 0}, "num_groups must divide seq_len=8, got 0"),
        ({"group_sizes": [3, 4]}, r"group_sizes must be positive and sum to seq_len=8, got \[3, 4\]"),
        ({"group_sizes": [0, 8]}, r"group_sizes must be positive and sum to seq_len=8, got \[0, 8\]"),
        ({"image_size": 10}, "encoder patch_size must divide image_size=10, got 4"),
        (
            {"image_size": 12, "velocity": VelocityConfig(dim=32, depth=1, patch_size=8, head_dim=16)},
            "velocity patch_size must divide image_size=12, got 8",
        ),
        ({"losses": LossConfig(repa=0.5, repa_weights="x.pth")}, "repa_layer must be from 0 to 1, got 8"),
        ({"losses": LossConfig(repa=0.5)}, "repa_weights must name a file with DINOv2 ViT-B/14 weights when repa > 0"),
        ({"encoder": CoderConfig(dim=24, head_dim=16, patch_size=4)}, "dim must be a multiple of head_dim=16, got 24"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_tokenizer(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "heun"}, "solver must be ab2 or euler, got 'heun'"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"data_std": 0.0}, "data_std must be above 0, got 0.0"),
        ({"time_shift": -1.0}, "time_shift must be above 0, got -1.0"),
        ({"decoding_shift": 0.0}, "decoding_shift must be above 0, got 0.0"),
    ],
)
def test_flows_that_lead_nowhere_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowConfig(**settings)


def test_the_read_outs_of_the_anchor_are_nested_sums() -> None:
    torch.manual_seed(0)
    anchor, rows, images = Anchor((1, 3, 4), 4, 5, 3, 8), torch.randn(3, 8, 4), make_images()
    cond, real = torch.randn(3, 4, 5), torch.tensor([[True] * n + [False] * (4 - n) for n in (1, 4, 3)])
    errors, read, start = [], anchor.bias, 0
    for end in (1, 4, 8):
        read = read + rows[:, start:end].reshape(3, -1) @ anchor.weight[4 * start : 4 * end]
        errors.append((read - images.flatten(1)).square().mean())
        start = end
    told = torch.stack(
        [torch.cat([row[mask], torch.zeros(4 - int(mask.sum()), 5)]) for row, mask in zip(cond, real, strict=True)]
    )
    of_cond = (anchor.read_cond(told.flatten(1)) - images.flatten(1)).square().mean()
    torch.testing.assert_close(anchor(rows, cond, real, images), torch.stack(errors).mean() + of_cond)
    whole = (anchor.read_cond(cond.flatten(1)) - images.flatten(1)).square().mean()
    torch.testing.assert_close(anchor(rows, cond, None, images), torch.stack(errors).mean() + whole)


def test_less_noise_at_the_start_is_scaled_noise() -> None:
    whole, half = make_tokenizer(), make_tokenizer(flow=FlowConfig(noise_scale=0.5))
    torch.testing.assert_close(half.start_noise(3, SEEDS), 0.5 * whole.start_noise(3, SEEDS))
    with pytest.raises(ValueError, match="noise_scale must be at least 0, got -1"):
        FlowConfig(noise_scale=-1)


def test_a_negative_loss_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="the weight of lpips must be at least 0, got -0.5"):
        LossConfig(lpips=-0.5)


class MeanError(torch.nn.Module):
    """A judge in place of LPIPS: one number an image."""

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first - second).square().mean(dim=(1, 2, 3), keepdim=True)


def test_lpips_judges_the_jump_to_the_end_and_reaches_pixels_out_of_range(monkeypatch) -> None:
    monkeypatch.setattr(perceptual, "load_lpips", lambda weights: MeanError())
    tokenizer = make_tokenizer(losses=LossConfig(lpips=0.5)).train()
    torch.nn.init.constant_(tokenizer.velocity.conv_out.bias, 30.0)  # estimates far above 1
    images, draws = make_images(), torch.Generator().manual_seed(0)
    losses = tokenizer.training_losses(images, draws)
    named = ("flow", "codebook", "commitment")
    expected = losses["flow"] + losses["codebook"] + 0.25 * losses["commitment"] + 0.5 * losses["lpips"]
    torch.testing.assert_close(losses["loss"], expected)
    assert set(losses) == {*named, "lpips", "loss"}
    (gradient,) = torch.autograd.grad(losses["lpips"], [tokenizer.velocity.conv_out.bias])
    assert float(gradient.abs().min()) > 0
    assert not [name for name in tokenizer.state_dict() if "judge" in name]


def test_the_classifier_judges_the_jump_to_the_end_by_stages() -> None:
    weights = LossConfig(classifier=0.1)
    tokenizer = make_tokenizer(image_size=32, velocity=VelocityConfig(32, 2, 8, 16), losses=weights).train()
    images = torch.rand(3, 3, 32, 32, generator=seeded(1)) * 2 - 1
    losses = tokenizer.training_losses(images, seeded(0))
    total = losses["flow"] + losses["codebook"] + 0.25 * losses["commitment"] + 0.1 * losses["classifier"]
    torch.testing.assert_close(losses["loss"], total)
    (gradient,) = torch.autograd.grad(losses["classifier"], [tokenizer.velocity.conv_out.bias])
    assert float(gradient.abs().min()) > 0
    assert not [name for name in tokenizer.state_dict() if "judge" in name]

    judge, other = load_classifier(), images.flip(3)
    distances, moves = [], [(0, 0), (-1, 0), (-2, 0)]
    moved, other_moved = (
        torch.stack([image.roll(move, (1, 2)) for image, move in zip(batch, moves, strict=True)])
        for batch in (images, other)
    )
    torch.testing.assert_close(perceptual.shift_rows(images), moved)
    torch.testing.assert_close(perceptual.shift_rows(images.repeat(2, 1, 1, 1))[5], images[2].roll((-1, -1), (1, 2)))
    for a, b in zip(judge.activations(moved), judge.activations(other_moved), strict=True):
        distances.append((2 - 2 * torch.cosine_similarity(a, b, dim=1)).mean())
    found = perceptual.classifier_distance(judge, images, other)
    torch.testing.assert_close(found, torch.stack(distances).mean())
    assert 0 < float(found) < 4 and float(perceptual.classifier_distance(judge, images, images)) == 0


def test_the_classifier_judges_only_what_it_knows() -> None:
    with pytest.raises(ValueError, match=r"losses.classifier must be 0 unless images are 32 x 32 .*, got 8 x 8 with 3"):
        make_tokenizer(losses=LossConfig(classifier=0.1))


def test_tensors_of_the_wrong_shape_are_refused() -> None:
    tokenizer, ids = make_tokenizer(), make_ids()
    with pytest.raises(ValueError, match=r"images must have shape \(B, C=3, H=8, W=8\), got \(3, 3, 8, 9\)"):
        tokenizer.encode(torch.zeros(3, 3, 8, 9))
    with pytest.raises(ValueError, match=r"seeds must have shape \(B=3\), got \(2,\)"):
        decode(tokenizer, ids, SEEDS[:2])
    with pytest.raises(ValueError, match=r"seeds must have shape \(B=4\), got \(3,\)"):
        tokenizer.open_preview(4, SEEDS)
    with pytest.raises(ValueError, match=r"ids must have shape \(B, T=2\), got \(3, 3\)"):
        tokenizer.open_preview(3).feed(ids[:, :3])


def test_a_complete_preview_takes_no_more_groups() -> None:
    tokenizer, ids = make_tokenizer(), make_ids()
    preview = DiffusionPreview(tokenizer, tokenizer.start_noise(3, SEEDS))
    for part in ids.split(2, dim=1):
        preview.feed(part)
    with pytest.raises(RuntimeError, match="feed must be called at most 4 times, once per group"):
        preview.feed(ids[:, :2])
