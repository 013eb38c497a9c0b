"""The classifier, its file format, and the weights that come with the package."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vision_ar.data.pixels import normalise
from vision_ar.data.sources import ParquetSource
from vision_ar.evaluation.frechet import RunningMoments, frechet_distance
from vision_ar.layers.classifier import SmallClassifier, load_classifier, save_classifier

torch.set_num_threads(1)

DATA = Path(os.environ.get("VISION_AR_DATA", Path(__file__).resolve().parents[2].parent / "shared" / "data"))
NUM_TEST = 500


@pytest.fixture(scope="module")
def bundled() -> SmallClassifier:
    return load_classifier()


@pytest.fixture(scope="module")
def real_images(bundled: SmallClassifier) -> tuple[torch.Tensor, torch.Tensor]:
    file = DATA / "cifar10" / "test-00000-of-00001.parquet"
    if not file.is_file():
        pytest.skip(f"{file} is not there; set VISION_AR_DATA to the folder that holds cifar10/")
    source = ParquetSource([file], list(bundled.class_names))
    pixels, labels = zip(*(source.square(row, 32, 3) for row in range(NUM_TEST)), strict=True)
    return normalise(torch.stack(pixels)), torch.tensor(labels)


def tiny() -> SmallClassifier:
    return SmallClassifier(("cat", "dog"), widths=(4, 6, 8), stem_dim=4, accuracy=0.5).eval()


def noise(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_bundled_classifier_is_small_and_says_what_it_is(bundled: SmallClassifier) -> None:
    assert len(bundled.class_names) == 10 and bundled.class_names[3] == "cat"
    assert bundled.accuracy is not None and bundled.accuracy > 0.8
    assert 128 <= bundled.feature_dim <= 256
    assert sum(weight.numel() for weight in bundled.parameters()) <= 900_000
    assert not bundled.training and not any(weight.requires_grad for weight in bundled.parameters())


def test_bundled_classifier_is_as_accurate_as_it_says(
    bundled: SmallClassifier, real_images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    images, labels = real_images
    accuracy = (bundled(images).argmax(dim=1) == labels).double().mean().item()
    assert bundled.accuracy is not None and accuracy >= bundled.accuracy - 0.02


def test_distance_grows_with_blur_and_noise(
    bundled: SmallClassifier, real_images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    images = real_images[0]
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    sets = (images[:250], images[250:], blurred[250:], noise(250))
    moments = [RunningMoments(bundled.feature_dim) for _ in sets]
    for each, part in zip(moments, sets, strict=True):
        each.update(bundled.features(part))
    near, blur, far = (frechet_distance(moments[0], other) for other in moments[1:])
    assert near < blur < far


def test_logits_are_the_classes_of_the_features() -> None:
    classifier, images = tiny(), noise(3)
    features = classifier.features(images)
    assert features.shape == (3, classifier.feature_dim) == (3, 8)
    torch.testing.assert_close(classifier(images), classifier.classes(features))
    torch.testing.assert_close(classifier.features(images[1:2]), features[1:2])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0), (torch.float16, 1e-2)])
def test_a_saved_classifier_comes_back(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    classifier, path = tiny(), tmp_path / "tiny.safetensors"
    save_classifier(classifier, path, dtype)
    loaded = load_classifier(path)
    assert (loaded.class_names, loaded.widths, loaded.accuracy) == (("cat", "dog"), (4, 6, 8), 0.5)
    torch.testing.assert_close(loaded(noise(2)), classifier(noise(2)), rtol=0, atol=tolerance)


def test_wrong_settings_and_images_are_refused() -> None:
    with pytest.raises(ValueError, match="class_names must have at least 2 names, got 1"):
        SmallClassifier(["cat"])
    with pytest.raises(ValueError, match="widths must have 3 entries, got 2"):
        SmallClassifier(["cat", "dog"], widths=(4, 8))
    with pytest.raises(ValueError, match=r"images must have shape \(B, C=3, H=32, W=32\), got \(1, 3, 28, 28\)"):
        tiny()(torch.zeros(1, 3, 28, 28))
    with pytest.raises(TypeError, match=r"images must be float in \[-1, 1\], got torch.uint8"):
        tiny().features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_files_that_are_no_classifier_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="got no such file; make one with: python -m"):
        load_classifier("no-such-name")
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not tensors at all")
    with pytest.raises(ValueError, match="must be a safetensors file, got") as caught:
        load_classifier(path)
    assert "\n" not in str(caught.value)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="in its header, got no class_names"):
        load_classifier(path)
    classifier = tiny()
    classifier.widths = (4, 6, 9)
    save_classifier(classifier, path)
    with pytest.raises(ValueError, match=r"must fit widths \(4, 6, 9\), got weights that do not") as caught:
        load_classifier(path)
    assert "\n" not in str(caught.value)
