"""Networks whose features judge images: Inception for FID, sFID and IS, small classifiers for in-domain distances.

Only Inception makes a FID. A distance on the features of a classifier is called `fd-<name>`, after that classifier.
"""

from __future__ import annotations

import hashlib
import io
import textwrap
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from vision_ar.data.pixels import normalise
from vision_ar.layers.classifier import IMAGE_SIZE, load_classifier
from vision_ar.shapes import check_shape

CLASSIFIER_SUFFIX = "-classifier"
"""Ends the folder name of every classifier that comes with the package."""
FILE_SUFFIX = ".safetensors"
SPATIAL_CHANNELS = 7  # Nash et al. 2021: about as many numbers, 7 x 17 x 17, as pooled features
SPATIAL_SIDE = 17
OFFICIAL_SHA256 = "6726825d"  # how the digest of torch-fidelity's file begins, as its name says


@dataclass
class Features:
    """What a network says about a batch of images, float32, on the device of its weights.

    Args:
        features: pooled, (B, F), for Fréchet and kernel distances.
        logits: of the classes, (B, K), for the Inception Score.
        spatial: part of a map with its places kept, (B, S), for sFID; None where the extractor has none.
    """

    features: Tensor
    logits: Tensor
    spatial: Tensor | None


class Extractor(nn.Module, ABC):
    """A frozen network that turns pixels into features."""

    name: str
    score_name: str
    """What a Fréchet distance on these features is called."""
    digest: str
    """First 16 hex digits of the sha256 of the weights, whatever file they came from."""
    feature_dim: int
    num_logits: int
    spatial_dim: int | None
    class_names: tuple[str, ...]
    """Names of the logits; empty where they have none."""
    accuracy: float | None
    """Share of test images that the network classifies correctly, None when nobody measured it."""
    official: bool = True
    """False when the weights are not the ones that a score of this name is defined with."""

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Features:
        """Extract features in evaluation mode and full precision, whatever surrounds the call.

        Args:
            pixels: (B, 3, H, W), or (B, 1, H, W), which is repeated to RGB; uint8, on any device.

        Raises:
            TypeError: if the pixels are not uint8.
            ValueError: if the shape is another one.
        """
        if pixels.dtype != torch.uint8:
            raise TypeError(f"pixels must be uint8 in [0, 255], got {pixels.dtype}")
        check_shape("pixels", pixels, "B C H W")
        if pixels.shape[1] not in (1, 3):
            raise ValueError(f"pixels must have 1 or 3 channels, got {pixels.shape[1]}")
        device = next(self.parameters()).device
        self.eval()  # a module around this one may have been switched to training, and batch norm with it
        with torch.autocast(device.type, enabled=False):
            return self._extract(pixels.to(device).expand(-1, 3, -1, -1))

    @abstractmethod
    def _extract(self, pixels: Tensor) -> Features:
        """Features of RGB pixels, (B, 3, H, W), uint8, on the device of the weights."""


class InceptionExtractor(Extractor):
    """The Inception v3 of 2015 that FID, sFID and the Inception Score are defined with, as torch-fidelity ports it.

    Images of any size are resized to 299x299, not cropped, with the bilinear resize of TensorFlow 1.

    Args:
        weights: file with its weights, read as plain tensors only; None for the one in the cache of torch hub.

    Raises:
        FileNotFoundError: if there is no such file; nothing is ever downloaded.
        ValueError: if the file is damaged, or holds something else.

    Source:
        Features: Heusel et al. 2017, the last pooling. Logits: Salimans et al. 2016, whose code leaves out the bias of
        the last layer. Spatial: Nash et al. 2021, in the layout of the evaluator of Dhariwal & Nichol 2021: the first
        7 channels of the tensor `mixed_6/conv:0`, the 1x1 branch of the third of four alike 17x17 blocks after its
        ReLU, flattened in the order row, column, channel.
    """

    name = "inception"
    score_name = "fid"
    feature_dim = 2048
    num_logits = 1008
    spatial_dim = SPATIAL_CHANNELS * SPATIAL_SIDE**2
    class_names = ()
    accuracy = None

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        path = _default_weights() if weights is None else Path(weights)
        self.network = _build_inception(path)
        self.official = hashlib.sha256(path.read_bytes()).hexdigest().startswith(OFFICIAL_SHA256)
        self.digest = weights_digest(self.network)

    def _extract(self, pixels: Tensor) -> Features:
        maps: list[Tensor] = []
        branch = self.network.get_submodule("Mixed_6d.branch1x1")
        with branch.register_forward_hook(lambda _module, _inputs, output: maps.append(output[:, :SPATIAL_CHANNELS])):
            features, logits = self.network(pixels)
        return Features(features, logits, maps[0].permute(0, 2, 3, 1).flatten(1))


class ClassifierExtractor(Extractor):
    """A small classifier as an in-domain judge; its distances compare only with distances under the same `digest`.

    It reads 32x32 images: others are resized to that, not cropped, bilinearly with antialiasing, from float values in
    [-1, 1] and without rounding.

    Args:
        path_or_name: a `.safetensors` file, whose stem becomes the name of the extractor, or a classifier that comes
            with the package, such as `cifar10-classifier`, whose extractor is called `cifar10`.

    Raises:
        FileNotFoundError: if there is no such file or name.
        ValueError: if the file is not a classifier.
    """

    spatial_dim = None

    def __init__(self, path_or_name: str | Path) -> None:
        super().__init__()
        self.network = load_classifier(path_or_name)
        path = Path(path_or_name)
        self.name = path.stem if path.suffix == FILE_SUFFIX else str(path_or_name).removesuffix(CLASSIFIER_SUFFIX)
        self.score_name = f"fd-{self.name}"
        self.digest = weights_digest(self.network)
        self.feature_dim = self.network.feature_dim
        self.class_names = self.network.class_names
        self.num_logits = len(self.class_names)
        self.accuracy = self.network.accuracy

    def _extract(self, pixels: Tensor) -> Features:
        images = normalise(pixels)
        if images.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
            images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        features = self.network.features(images)
        return Features(features, self.network.classes(features), None)


def load_extractor(name: str, weights: str | Path | None = None) -> Extractor:
    """Load an extractor: on the CPU, in evaluation mode, without gradients for its weights.

    Args:
        name: `inception`, a name from `bundled_extractors`, or a `.safetensors` file with a classifier.
        weights: file with the weights of `inception`; None for the one in the cache of torch hub.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the name is unknown, a file is damaged, or `weights` are given for a classifier.
    """
    if name == InceptionExtractor.name:  # the one whose weights do not come with its name
        return InceptionExtractor(weights)
    if weights is not None:
        raise ValueError(f"weights must be left out for {name}, got {weights}; only inception reads them from a file")
    if Path(name).suffix == FILE_SUFFIX:
        return ClassifierExtractor(name)
    if name in bundled_extractors():
        return ClassifierExtractor(name + CLASSIFIER_SUFFIX)
    known = ", ".join([InceptionExtractor.name, *bundled_extractors()])
    raise ValueError(f"name must be one of {known} or a {FILE_SUFFIX} file with a classifier, got {name}")


def bundled_extractors() -> list[str]:
    """Names of the classifiers that come with the package, without the end of their folder names."""
    folders = (folder.name for folder in (resources.files("vision_ar") / "models").iterdir())
    return sorted(name.removesuffix(CLASSIFIER_SUFFIX) for name in folders if name.endswith(CLASSIFIER_SUFFIX))


def weights_digest(module: nn.Module) -> str:
    """First 16 hex digits of the sha256 of names, types, shapes and values of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if name.endswith("num_batches_tracked"):  # counts training steps: some files lack it, no result depends on it
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _default_weights() -> Path:
    """Where torch hub, and torch-fidelity with it, keeps the file."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]


def _build_inception(path: Path) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    if not path.is_file():
        raise FileNotFoundError(
            f"{path} must be a file with Inception weights, got no such file; "
            f"fetch {URL_INCEPTION_V3} and put it there, or name another copy with --weights FILE"
        )
    plain = io.BytesIO()  # torch-fidelity unpickles whatever it is given, so it is given only what was checked
    torch.save(_read_tensors(path), plain)
    plain.seek(0)
    try:
        return FeatureExtractorInceptionV3(InceptionExtractor.name, ["2048", "logits_unbiased"], plain)
    except RuntimeError as error:
        raise ValueError(f"{path} must fit Inception v3, got {textwrap.shorten(str(error), 200)}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == FILE_SUFFIX:
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise  # not readable, which says nothing about what is in it
    except Exception as error:  # the unpickler's refusals have no common base, and advise to run the file as code
        raise ValueError(
            f"{path} must be a whole file of plain tensors, it was refused ({type(error).__name__}); fetch it again"
        ) from error
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise ValueError(f"{path} must hold tensors by their names, got a {type(weights).__name__} of something else")
    return weights
