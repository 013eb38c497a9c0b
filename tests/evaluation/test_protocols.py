"""What protocols fix: pixels, labels and names of scores; and that every protocol can be followed."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vision_ar.data.pixels import normalise
from vision_ar.evaluation.extractors import InceptionExtractor, bundled_extractors, load_extractor
from vision_ar.evaluation.frechet import RunningMoments
from vision_ar.evaluation.protocols import PROTOCOLS, Protocol, find_protocol, fit_size, labels_for, round_pixels
from vision_ar.evaluation.scoring import score, score_name
from vision_ar.evaluation.statistics import Statistics

torch.set_num_threads(1)

FEATURE_METRICS = {"fid", "sfid", "is", "kid", "precision_recall", "accuracy"}
TOKENIZER_METRICS = {"psnr", "ssim", "usage"}
LEVELS = torch.arange(256, dtype=torch.uint8)
each = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)


class FakeStore:
    """Features of 20 images without a network."""

    def __init__(self, extractor: Any) -> None:
        self.extractor = extractor
        self.features, self.logits = np.random.RandomState(0).randn(2, 20, 6).astype(np.float32)

    def moments(self, name: str = "features") -> RunningMoments:
        moments = RunningMoments(6)
        moments.update(torch.from_numpy(self.features if name == "features" else self.logits))
        return moments


def fake_scores(metrics: tuple[str, ...], extractor: Any, labels: list[int] | None = None) -> dict[str, float]:
    store: Any = FakeStore(extractor)
    reference = Statistics("set", "", store.moments(), store.moments("spatial"), store.features)
    return score(store, reference, metrics, labels)


INCEPTION: Any = SimpleNamespace(name=InceptionExtractor.name, score_name=InceptionExtractor.score_name, spatial_dim=6)
IN_DOMAIN: Any = SimpleNamespace(name="pets", score_name="fd-pets", spatial_dim=6)


@pytest.mark.parametrize(
    ("value", "nearest", "half_up", "truncate"),
    [
        (-1.0, 0, 0, 0),
        (-0.999, 0, 0, 0),  # level 0.1275
        (-0.994, 1, 1, 0),  # 0.765
        (-0.4, 76, 77, 76),  # 76.5: halves go to even, up, down
        (0.0, 128, 128, 127),  # 127.5
        (0.4, 178, 179, 178),  # 178.5
        (0.8, 230, 230, 229),  # 229.5
        (0.994, 254, 254, 254),  # 254.235
        (0.998, 255, 255, 254),  # 254.745
        (1.0, 255, 255, 255),
    ],
)
def test_known_values_are_rounded_by_their_rule(value: float, nearest: int, half_up: int, truncate: int) -> None:
    image = torch.tensor([value])
    for rule, expected in (("nearest", nearest), ("half_up", half_up), ("truncate", truncate)):
        assert round_pixels(image, rule).tolist() == [expected], rule


def test_halves_go_to_the_even_level_up_or_down() -> None:
    centred = torch.arange(-127, 128)
    halves, lower = centred / 127.5, centred + 127  # 127.5 x + 127.5 is lower + 0.5, without a rounding error
    assert torch.equal(round_pixels(halves, "nearest").long(), lower + lower % 2)
    assert torch.equal(round_pixels(halves, "half_up").long(), lower + 1)
    assert torch.equal(round_pixels(halves, "truncate").long(), lower)


@pytest.mark.parametrize("rule", ["nearest", "half_up", "truncate"])
def test_all_levels_survive_the_way_to_images_and_back(rule: str) -> None:
    pixels = LEVELS.reshape(1, 1, 16, 16)
    assert torch.equal(round_pixels(normalise(pixels), rule), pixels)


def test_images_a_little_off_their_level_lose_one_under_truncation_only() -> None:
    level = LEVELS[1:].long()
    below = (level - 0.01) / 127.5 - 1
    assert torch.equal(round_pixels(below, "truncate").long(), level - 1)
    for rule in ("nearest", "half_up"):
        assert torch.equal(round_pixels(below, rule).long(), level)


def test_truncation_is_half_a_level_darker_and_the_others_are_even_on_average() -> None:
    images = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    for rule, expected in (("nearest", 0.0), ("half_up", 0.0), ("truncate", -0.5)):
        bias = (round_pixels(images, rule).double() - (images + 1) * 127.5).mean()
        assert bias.item() == pytest.approx(expected, abs=0.01), rule


@pytest.mark.parametrize("rule", ["nearest", "half_up", "truncate"])
def test_values_out_of_range_are_clamped_and_do_not_wrap_around(rule: str) -> None:
    images = torch.tensor([-float("inf"), -3.0, -1.004, 1.004, 3.0, float("inf")])
    assert round_pixels(images, rule).tolist() == [0, 0, 0, 255, 255, 255]


def test_half_precision_is_rounded_in_float32() -> None:
    images = torch.linspace(-1, 1, 301).to(torch.bfloat16)
    for rule in ("nearest", "half_up", "truncate"):
        assert torch.equal(round_pixels(images, rule), round_pixels(images.float(), rule))


def test_another_rounding_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="rounding must be one of nearest, half_up, truncate, got 'floor'"):
        round_pixels(torch.zeros(1), "floor")


@pytest.mark.parametrize("rule", ["balanced", "uniform"])
def test_a_sample_has_the_same_class_however_many_there_are(rule: str) -> None:
    whole = labels_for(rule, 300, 10, seed=3)
    for count in (1, 7, 10, 299):
        assert labels_for(rule, count, 10, seed=3) == whole[:count]
    assert set(whole) == set(range(10)) and all(type(label) is int for label in whole)
    assert labels_for(rule, 5, 1, seed=3) == [0] * 5


def test_balanced_labels_have_every_class_equally_often_whatever_the_seed() -> None:
    assert set(Counter(labels_for("balanced", 5000, 100, seed=0)).values()) == {50}
    assert set(Counter(labels_for("balanced", 57, 10, seed=0)).values()) == {5, 6}
    assert labels_for("balanced", 57, 10, seed=0) == labels_for("balanced", 57, 10, seed=1)


def test_uniform_labels_are_drawn_evenly_and_from_their_seed() -> None:
    labels = labels_for("uniform", 5000, 10, seed=0)
    torch.manual_seed(1)
    assert labels == labels_for("uniform", 5000, 10, seed=0) != labels_for("uniform", 5000, 10, seed=1)
    counts = torch.tensor([labels.count(label) for label in range(10)]).double()
    # chi-squared with 9 degrees of freedom: even draws fail once in a thousand seeds, counts that are balanced too
    assert 1.15 < float(((counts - 500).square() / 500).sum()) < 27.9
    same_as_before = sum(a == b for a, b in zip(labels, labels[1:], strict=False))
    assert 400 < same_as_before < 600


def test_another_label_rule_is_refused() -> None:
    for rule in ("none", "random"):
        with pytest.raises(ValueError, match=f"labels must be uniform or balanced, got '{rule}'"):
            labels_for(rule, 3, 10, 0)


def test_images_are_shrunk_bicubically_without_antialiasing_when_the_protocol_says_so() -> None:
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = F.interpolate(images, size=(16, 16), mode="bicubic", align_corners=False, antialias=False)
    found = fit_size(images, 16, "bicubic")
    assert torch.equal(found, expected)
    assert not torch.allclose(found, F.interpolate(images, size=(16, 16), mode="bicubic", antialias=True), atol=0.01)
    for resize in ("none", "bicubic"):
        assert fit_size(images, 24, resize) is images


@pytest.mark.parametrize("shape", [(24, 24), (16, 24), (24, 16)])
def test_images_of_another_size_are_refused_when_the_protocol_resizes_none(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must make images of 16 x 16 pixels for this protocol, got .*24"):
        fit_size(torch.zeros(1, 3, *shape), 16, "none")


@each
def test_every_protocol_can_be_followed(protocol: Protocol) -> None:
    assert find_protocol(protocol.name) is protocol
    extractors = ("none",) if protocol.kind == "likelihood" else ("inception", *bundled_extractors())
    assert protocol.extractor in extractors
    assert protocol.split in ("train", "val", "none") and protocol.resize in ("none", "bicubic")
    assert protocol.num_samples > 0 and protocol.image_size > 0 and protocol.channels in (1, 3)
    if protocol.kind != "likelihood":  # no image is made
        assert round_pixels(torch.zeros(1), protocol.rounding).dtype == torch.uint8
    assert all(getattr(protocol, field.name) for field in fields(protocol) if field.type == "str")
    if protocol.kind == "generation":
        assert len(labels_for(protocol.labels, 5, 10, 0)) == 5
    else:
        assert protocol.kind in ("reconstruction", "likelihood") and protocol.labels == "none"
    assert not protocol.closed or protocol.reference_digests


@each
def test_every_metric_of_a_protocol_is_scored_by_somebody(protocol: Protocol) -> None:
    own = {"reconstruction": TOKENIZER_METRICS | FEATURE_METRICS, "likelihood": {"bits"}}
    known = own.get(protocol.kind, FEATURE_METRICS)
    assert protocol.metrics and set(protocol.metrics) <= known and len(set(protocol.metrics)) == len(protocol.metrics)
    extractor = INCEPTION if protocol.extractor == "inception" else IN_DOMAIN
    for metric in protocol.metrics:
        assert bool(fake_scores((metric,), extractor, labels=[0] * 20)) == (metric in FEATURE_METRICS), metric
    if protocol.extractor != "inception":
        assert "sfid" not in protocol.metrics  # classifiers have no spatial features


def test_an_unknown_protocol_is_answered_with_all_known_ones() -> None:
    with pytest.raises(ValueError, match=f"one of {re.escape(', '.join(PROTOCOLS))}, got 'imagenet'$"):
        find_protocol("imagenet")


@pytest.mark.parametrize("metric", ["fid", "sfid", "is", "kid", "precision", "recall", "accuracy"])
def test_names_are_bare_under_inception_and_never_in_domain(metric: str) -> None:
    bare = score_name(metric, INCEPTION)
    assert bare == {"is": "inception_score"}.get(metric, metric)
    own = {"fid": "fd", "sfid": "sfd", "is": "score", "kid": "kd"}.get(metric, metric)
    for extractor in (IN_DOMAIN, load_extractor("cifar10")):
        assert score_name(metric, extractor) == f"{own}-{extractor.name}" != bare


def test_no_key_of_in_domain_scores_is_one_of_inception_scores() -> None:
    metrics = tuple(sorted(FEATURE_METRICS))
    bare, own = (set(fake_scores(metrics, extractor, [0] * 20)) for extractor in (INCEPTION, IN_DOMAIN))
    assert len(bare) == len(own) == 9 and not bare & own
    assert {"fid", "sfid", "inception_score", "kid", "precision", "recall"} < bare
    assert not any("fid" in name or "inception" in name or "kid" in name for name in own)
