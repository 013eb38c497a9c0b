"""Extractors against the networks they wrap, called directly; Inception has random weights, so that no file is needed.

What random weights cannot show is that the official file fits: it is read by the same code, but not here.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as fidelity
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity import FeatureExtractorInceptionV3

from vision_ar.data.pixels import normalise
from vision_ar.evaluation.extractors import Extractor, bundled_extractors, load_extractor, weights_digest
from vision_ar.layers.classifier import SmallClassifier, load_classifier, save_classifier

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def inception(inception_weights: Path) -> Extractor:
    return load_extractor("inception", inception_weights)


@pytest.fixture(scope="module")
def cifar10() -> Extractor:
    return load_extractor("cifar10")


def noise(count: int, channels: int = 3, side: int = 32, seed: int = 0) -> Tensor:
    """Pictures whose contrast grows from the first to the last."""
    draws = torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))
    return (draws * 255 * torch.arange(1, count + 1)[:, None, None, None] / count).to(torch.uint8)


def save_tiny(path: Path, accuracy: float | None = 0.5, scale: float = 1.0) -> SmallClassifier:
    """Save a classifier of two classes and return what `load_classifier` makes of the file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = SmallClassifier(("cat", "dog"), widths=(4, 6, 8), stem_dim=4, accuracy=accuracy)
    with torch.no_grad():
        classifier.classes.bias.mul_(scale)
    save_classifier(classifier, path)
    return load_classifier(path)


def spread(features: Tensor) -> float:
    """Mean absolute difference between the first and the last row, as a share of the mean size."""
    return float((features[0] - features[-1]).abs().mean() / features.abs().mean())


class Evil:
    """What a pickle could do if it were run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path("pwned").write_text, ("",)


def test_inception_features_are_those_of_torch_fidelity(inception: Extractor, inception_weights: Path) -> None:
    direct = FeatureExtractorInceptionV3("direct", ["2048", "logits_unbiased", "logits"], str(inception_weights))
    pixels = noise(3)
    features, unbiased, biased = direct(pixels)
    found = inception(pixels)
    torch.testing.assert_close(found.features, features)
    torch.testing.assert_close(found.logits, unbiased)
    assert (found.logits - biased).abs().mean() > 0.01
    assert spread(found.features) > 0.05 and spread(found.logits) > 0.05  # equality is no accident of constants
    assert found.features.shape == (3, inception.feature_dim) == (3, 2048)
    assert found.logits.shape == (3, inception.num_logits) == (3, 1008)


def test_spatial_features_are_seven_channels_of_the_branch_in_rows_columns_channels(
    inception: Extractor, inception_weights: Path
) -> None:
    direct = FeatureExtractorInceptionV3("direct", ["2048"], str(inception_weights))
    inputs: list[Tensor] = []
    direct.Mixed_6d.register_forward_hook(lambda _module, args, _output: inputs.append(args[0]))
    pixels = noise(2)
    direct(pixels)
    branch = direct.Mixed_6d.branch1x1
    activations = F.relu(branch.bn(branch.conv(inputs[0])))  # (B, 192, 17, 17)
    found = inception(pixels).spatial
    assert found is not None and found.shape == (2, inception.spatial_dim) == (2, 2023)
    for row, column, channel in [(0, 0, 0), (0, 0, 6), (0, 1, 0), (1, 0, 0), (5, 11, 4), (16, 16, 6)]:
        torch.testing.assert_close(found[:, (row * 17 + column) * 7 + channel], activations[:, channel, row, column])
    expected = torch.stack([activations[:, channel].flatten(1) for channel in range(7)], dim=2).flatten(1)
    torch.testing.assert_close(found, expected)
    assert spread(found) > 0.05


def test_an_image_has_the_same_features_in_any_batch_and_leaves_nothing_behind(inception: Extractor) -> None:
    pixels = noise(2)
    both, single = inception(pixels), inception(pixels[1:])
    assert both.spatial is not None and single.spatial is not None
    torch.testing.assert_close(single.features, both.features[1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(single.spatial, both.spatial[1:], rtol=1e-4, atol=1e-4)
    assert not any(module._forward_hooks for module in inception.modules())


def test_digest_names_the_weights_and_not_their_file(
    inception: Extractor, inception_weights: Path, tmp_path: Path
) -> None:
    weights, path = torch.load(inception_weights, weights_only=True), tmp_path / "copy.safetensors"
    save_file({name: value for name, value in weights.items() if "num_batches" not in name}, path)
    assert load_extractor("inception", path).digest == inception.digest
    assert len(inception.digest) == 16 and int(inception.digest, 16) >= 0
    weights["fc.bias"][7] += 1e-3
    save_file(weights, path)
    assert load_extractor("inception", path).digest != inception.digest
    path.unlink()


def test_digest_sees_values_shapes_types_and_names() -> None:
    def digest(**weights: Tensor) -> str:
        module = torch.nn.Module()
        for name, value in weights.items():
            module.register_buffer(name, value)
        return weights_digest(module)

    values = torch.arange(6.0)
    others = [
        digest(a=values.flip(0)),
        digest(a=values.view(2, 3)),
        digest(a=values.view(torch.int32)),
        digest(b=values),
        digest(a=values, b=values),
    ]
    assert digest(a=values.clone()) == digest(a=values)
    assert digest(a=values.view(2, 3).T.contiguous().T) == digest(a=values.view(2, 3))
    assert digest(a=values, num_batches_tracked=torch.tensor(3)) == digest(a=values)
    assert len({digest(a=values), *others}) == 6


def test_weights_in_the_cache_of_torch_hub_need_no_path(
    inception: Extractor, inception_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").symlink_to(inception_weights)
    assert load_extractor("inception").digest == inception.digest


def test_missing_weights_are_not_downloaded_but_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: pytest.fail("tried to download"))
    cached = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    for weights, path in ((None, cached), (tmp_path / "no.pth", tmp_path / "no.pth"), (tmp_path, tmp_path)):
        with pytest.raises(FileNotFoundError, match="got no such file; fetch https://.* --weights FILE") as caught:
            load_extractor("inception", weights)
        message = str(caught.value)
        assert message.startswith(f"{path} must") and fidelity.URL_INCEPTION_V3 in message and "\n" not in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["empty", "garbage", "cut off"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"broken{suffix}"
    weights = {"fc.weight": torch.ones(8, 8)}
    (torch.save if suffix == ".pth" else save_file)(weights, path)
    path.write_bytes({"empty": b"", "garbage": b"no tensors" * 100, "cut off": path.read_bytes()[:-50]}[damage])
    with pytest.raises(ValueError, match=rf"broken\{suffix} must be a whole file of plain tensors") as caught:
        load_extractor("inception", path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"fc.weight": torch.ones(8, 8)}, "must fit Inception v3, got"),
        ([torch.ones(8, 8)], "must hold tensors by their names, got a list"),
        ({"state_dict": {"fc.weight": torch.ones(8, 8)}}, "must hold tensors by their names, got a dict"),
        ({7: torch.ones(8, 8)}, "must hold tensors by their names, got a dict"),
    ],
)
def test_other_content_is_refused_in_one_short_line(tmp_path: Path, content: Any, reason: str) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"other.pth {reason}") as caught:
        load_extractor("inception", path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 300


def test_a_pickle_with_code_is_refused_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, proof = tmp_path / "evil.pth", tmp_path / "pwned"
    torch.save({"fc.weight": Evil()}, path)
    with pytest.raises(ValueError, match="evil.pth must be a whole file of plain tensors, it was refused") as caught:
        load_extractor("inception", path)
    assert not proof.exists() and "weights_only" not in str(caught.value)
    torch.load(path, weights_only=False)
    assert proof.exists()  # what the refusal prevented


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("may not be read")

    (tmp_path / "locked.pth").write_bytes(b"")
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(PermissionError, match="may not be read"):
        load_extractor("inception", tmp_path / "locked.pth")


def test_grey_is_repeated_to_rgb(inception: Extractor, cifar10: Extractor) -> None:
    grey = noise(2, channels=1)
    for extractor in (inception, cifar10):
        found, expected = extractor(grey), extractor(grey.repeat(1, 3, 1, 1))
        torch.testing.assert_close(found.features, expected.features)
        torch.testing.assert_close(found.logits, expected.logits)


def test_cifar10_features_are_those_of_its_classifier(cifar10: Extractor) -> None:
    classifier, pixels = load_classifier("cifar10-classifier"), noise(4)
    found = cifar10(pixels)
    torch.testing.assert_close(found.features, classifier.features(normalise(pixels)))
    torch.testing.assert_close(found.logits, classifier(normalise(pixels)))
    assert found.spatial is None and cifar10.spatial_dim is None
    assert (cifar10.feature_dim, cifar10.num_logits) == (found.features.shape[1], found.logits.shape[1]) == (192, 10)
    assert (cifar10.class_names, cifar10.accuracy) == (classifier.class_names, classifier.accuracy)
    assert spread(found.features) > 0.05


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (32, 48)])
def test_other_sizes_are_resized_to_the_classifiers(cifar10: Extractor, size: tuple[int, int]) -> None:
    pixels = noise(2, side=64)[:, :, : size[0], : size[1]]
    images = F.interpolate(normalise(pixels), size=(32, 32), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(cifar10(pixels).features, load_classifier().features(images))


def test_only_inception_scores_are_called_fid(inception: Extractor, cifar10: Extractor, tmp_path: Path) -> None:
    save_tiny(tmp_path / "fashion.v2.safetensors")
    fashion = load_extractor(str(tmp_path / "fashion.v2.safetensors"))
    names = [(each.name, each.score_name) for each in (inception, cifar10, fashion)]
    assert names == [("inception", "fid"), ("cifar10", "fd-cifar10"), ("fashion.v2", "fd-fashion.v2")]
    assert inception.class_names == () and inception.accuracy is None


def test_a_classifier_file_is_loaded_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    classifier = save_tiny(path)
    tiny = load_extractor(str(path))
    torch.testing.assert_close(tiny(noise(2)).logits, classifier(normalise(noise(2))))
    assert (tiny.feature_dim, tiny.num_logits, tiny.class_names, tiny.accuracy) == (8, 2, ("cat", "dog"), 0.5)
    save_tiny(tmp_path / "renamed.safetensors", accuracy=None)
    renamed = load_extractor(str(tmp_path / "renamed.safetensors"))
    assert renamed.digest == tiny.digest and renamed.accuracy is None
    save_tiny(path, scale=2.0)
    assert load_extractor(str(path)).digest != tiny.digest
    with pytest.raises(FileNotFoundError, match="got no such file; make one with"):
        load_extractor(str(tmp_path / "missing.safetensors"))


def test_a_classifier_put_beside_the_bundled_ones_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("pets-classifier", "pets-dar"):
        (tmp_path / "models" / folder).mkdir(parents=True)
    save_tiny(tmp_path / "models" / "pets-classifier" / "model.safetensors")
    assert "cifar10" in bundled_extractors()
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    assert bundled_extractors() == ["pets"]
    pets = load_extractor("pets")
    assert (pets.name, pets.score_name, pets.class_names) == ("pets", "fd-pets", ("cat", "dog"))


@pytest.mark.parametrize("name", ["nope", "", "cifar10-dar", "cifar10-classifier", "weights.pth", "../cifar10"])
def test_unknown_names_are_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f"name must be one of inception, .*cifar10.* or a .*, got {name}$"):
        load_extractor(name)


def test_weights_are_for_inception_only(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny.safetensors")
    for name in ("cifar10", str(tmp_path / "tiny.safetensors"), "nope"):
        with pytest.raises(ValueError, match="weights must be left out for .*, got some.pth; only inception"):
            load_extractor(name, "some.pth")


def test_weights_are_frozen_and_results_need_no_gradient(inception: Extractor, cifar10: Extractor) -> None:
    for extractor in (inception, cifar10):
        assert not any(module.training for module in extractor.network.modules())  # type: ignore[union-attr]
        assert not any(weight.requires_grad for weight in extractor.parameters())
    cifar10.requires_grad_(True)
    found = cifar10(noise(1))
    cifar10.requires_grad_(False)
    assert not found.features.requires_grad and not found.logits.requires_grad


def test_neither_training_mode_nor_autocast_around_an_extractor_changes_its_features(cifar10: Extractor) -> None:
    pixels, around = noise(4), torch.nn.ModuleList([cifar10])
    expected, digest = cifar10(pixels).features, weights_digest(cifar10)
    around.train()
    torch.testing.assert_close(cifar10(pixels).features, expected)
    assert weights_digest(cifar10) == digest  # batch norm kept its statistics
    with torch.autocast("cpu", torch.bfloat16):
        found = cifar10(pixels)
    assert found.features.dtype == found.logits.dtype == torch.float32
    torch.testing.assert_close(found.features, expected)


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_results_are_on_the_device_of_the_weights(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "meta":
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no such device
    found = load_extractor("cifar10").to(device)(noise(2, side=28))
    assert found.features.device.type == found.logits.device.type == device


def test_pixels_of_other_kinds_and_shapes_are_refused(inception: Extractor, cifar10: Extractor) -> None:
    for extractor in (inception, cifar10):
        for dtype in (torch.float32, torch.int64):
            with pytest.raises(TypeError, match=rf"pixels must be uint8 in \[0, 255\], got {dtype}"):
                extractor(noise(1).to(dtype))
        with pytest.raises(ValueError, match=r"pixels must have shape \(B, C, H, W\), got \(3, 32, 32\)"):
            extractor(noise(1)[0])
        with pytest.raises(ValueError, match="pixels must have 1 or 3 channels, got 4"):
            extractor(noise(1, channels=4))
