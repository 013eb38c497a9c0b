"""Outputs of the published D-AR tokenizer classes at tiny sizes, and the shapes of the published weights."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import fill as fill_rule
from tests.golden import hashed_input, read_golden
from vision_ar.checkpoints.dar import tokenizer_entries
from vision_ar.checkpoints.families import back
from vision_ar.checkpoints.importing import FAMILIES, fill
from vision_ar.interfaces import Tokens
from vision_ar.layers.velocity import VelocityConfig
from vision_ar.tokenizers.diffusion import (
    CoderConfig,
    DiffusionPreview,
    DiffusionTokenizer,
    FlowConfig,
    LossConfig,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def published(shared_reference: Path) -> dict[str, list[int]]:
    """Name and shape of every published tensor of the full-size tokenizer, without the usage buffer."""
    shapes = json.loads((shared_reference / "dar_tokenizer_v1.json").read_text(encoding="utf-8"))
    return {name: shape for name, shape in shapes.items() if "codebook_used" not in name}


@pytest.fixture(scope="module")
def golden(shared_reference: Path) -> dict[str, Any]:
    return read_golden(shared_reference, "dar_tokenizer_tiny")


TINY = replace(FAMILIES["dar-tokenizer"], entries=partial(tokenizer_entries, 2, 2))
"""The table of the published tokenizer, for two blocks of each kind."""


@pytest.fixture(scope="module")
def weights(published: dict[str, list[int]]) -> dict[str, Tensor]:
    """Weights of the tiny tokenizer by the fill rule, under their published names."""
    layer = re.compile(r"(?:encoder_layers|decoder_layers|blocks)\.(\d+)\.")
    names = [name for name in published if not (found := layer.search(name)) or int(found[1]) < 2]
    shapes = {name: tuple(value.shape) for name, value in back(TINY, make_tokenizer().state_dict()).items()}
    return fill_rule(names, shapes)


def make_tokenizer(solver: str = "ab2") -> DiffusionTokenizer:
    coder = CoderConfig(dim=128, depth=2, patch_size=16)
    flow, velocity = FlowConfig(num_steps=4, solver=solver), VelocityConfig(dim=128, depth=2, patch_size=8)
    return DiffusionTokenizer(64, 3, 16, 4, 64, 8, coder, coder, velocity, flow).eval()


def filled_tokenizer(weights: dict[str, Tensor], solver: str = "ab2") -> DiffusionTokenizer:
    tokenizer = make_tokenizer(solver)
    fill(tokenizer, TINY, weights, "ema")
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(weights: dict[str, Tensor]) -> DiffusionTokenizer:
    return filled_tokenizer(weights)


@pytest.fixture(scope="module")
def images(golden: dict[str, Any]) -> Tensor:
    return hashed_input(tuple(golden["image_shape"]), golden["image_j"])


@pytest.fixture(scope="module")
def noise(golden: dict[str, Any]) -> Tensor:
    return hashed_input(tuple(golden["image_shape"]), golden["noise_j"], golden["noise_scale"])


def decode(tokenizer: DiffusionTokenizer, golden: dict[str, Any], noise: Tensor, monkeypatch) -> Tensor:
    """Decode the recorded codes from the recorded noise."""
    monkeypatch.setattr(tokenizer, "start_noise", lambda batch_size, seeds: noise)
    with torch.no_grad():
        return tokenizer.decode(Tokens.of(tokenizer.spec, ids=torch.tensor(golden["codes"])))


def check(images: Tensor, golden: dict[str, Any], name: str, count: int) -> None:
    """First pixels, mean and spread of a batch of images against the record `name`."""
    torch.testing.assert_close(images[0, 0, 0, :count], torch.tensor(golden[f"{name}_b0c0r0_first{count}"]), **CLOSE)
    check_moments(images, golden, name)


def check_moments(images: Tensor, golden: dict[str, Any], name: str) -> None:
    moments = torch.stack([images.mean(), images.std()])
    torch.testing.assert_close(moments, torch.tensor(golden[f"{name}_mean_std"]), **CLOSE)


def test_the_full_size_has_as_many_weights_as_published() -> None:
    with torch.device("meta"):
        tokenizer = DiffusionTokenizer(losses=LossConfig(repa=0.5, repa_weights="a file"))
    assert round(sum(math.prod(p.shape) for p in tokenizer.parameters()) / 1e6, 2) == 307.44


def test_codes_are_those_of_the_published_classes(tokenizer, images, golden) -> None:
    assert tokenizer.encode(images).ids.tolist() == golden["codes"]


def test_condition_vectors_are_those_of_the_published_classes(tokenizer, golden) -> None:
    with torch.no_grad():
        cond = tokenizer.decoder(tokenizer.quantizer.lookup(torch.tensor(golden["codes"])))
    for token in (0, 15):
        torch.testing.assert_close(cond[0, token, :8], torch.tensor(golden[f"cond_b0_t{token}_first8"]), **CLOSE)
    assert float(cond.abs().mean()) == pytest.approx(golden["cond_abs_mean"], rel=1e-5)


def test_the_velocity_is_that_of_the_published_classes(tokenizer, noise, golden) -> None:
    with torch.no_grad():
        cond = tokenizer.decoder(tokenizer.quantizer.lookup(torch.tensor(golden["codes"])))
        velocity = tokenizer.velocity(noise, torch.full((2,), 0.25), cond[:, 4:8])
    expected = torch.tensor(golden["velocity_t0.25_group1_b0c0r0_first8"])
    torch.testing.assert_close(velocity[0, 0, 0, :8], expected, **CLOSE)
    assert float(velocity.abs().mean()) == pytest.approx(golden["velocity_abs_mean"], rel=1e-5)


def test_decoded_images_are_those_of_the_published_solver(tokenizer, noise, golden, monkeypatch) -> None:
    check(decode(tokenizer, golden, noise, monkeypatch), golden, "decoded_adams2", 8)


def test_euler_decodes_to_the_recorded_mean_and_spread(weights, noise, golden, monkeypatch) -> None:
    images = decode(filled_tokenizer(weights, "euler"), golden, noise, monkeypatch)
    check_moments(images, golden, "decoded_euler")


def test_previews_are_those_of_the_published_classes(tokenizer, noise, golden) -> None:
    preview = DiffusionPreview(tokenizer, noise)
    with torch.no_grad():
        shown = [preview.feed(part) for part in torch.tensor(golden["codes"]).split(4, dim=1)]
    for number in (1, 2, 3):
        check(shown[number - 1], golden, f"preview_clip{number}", 4)
    check(shown[3], golden, "decoded_adams2", 8)


def test_training_losses_are_those_of_the_published_classes(tokenizer, images, noise, golden) -> None:
    with torch.no_grad():
        losses = tokenizer.pass_at(images, torch.tensor(golden["train_u"]), noise).losses
    assert float(losses["flow"]) == pytest.approx(golden["train_fm_loss"], rel=1e-5)
    assert float(losses["codebook"]) == pytest.approx(golden["train_vq_loss"], rel=1e-5)
    commitment = tokenizer.losses.commitment * float(losses["commitment"])  # recorded with its weight
    assert commitment == pytest.approx(golden["train_commit_loss"], rel=1e-5)
    assert float(losses["loss"]) == pytest.approx(
        golden["train_fm_loss"] + golden["train_vq_loss"] + golden["train_commit_loss"], rel=1e-5
    )
