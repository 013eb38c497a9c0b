"""A small image classifier whose pooled features serve as an in-domain judge of 32x32 images.

A score on these features is named after them, `fd-cifar10`. It is not FID: it has another network and another scale,
and only compares runs of this project with each other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vision_ar.shapes import check_shape

IMAGE_SIZE = 32
BUNDLED = "cifar10-classifier"
"""Name of the classifier that comes with the package."""
SETTINGS = ("class_names", "widths", "stem_dim", "accuracy")
MAKE_ONE = "make one with: python -m benchmarks.train_classifier --data DIR --out FILE"


class SmallClassifier(nn.Module):
    """Residual convolutional network for 32x32 images; three stages at 15x15, 7x7 and 3x3.

    Batch norm makes training mode differ from evaluation mode; `load_classifier` returns evaluation mode.

    Args:
        class_names: names of the class ids 0, 1, ..., at least 2.
        widths: channels of the three stages; the last one is the number of features F.
        stem_dim: channels of the first convolution.
        accuracy: share of test images that the weights classify correctly, None when nobody measured it.

    Raises:
        ValueError: if there are fewer than 2 classes or not 3 widths.

    Source:
        Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", the layout; narrower, with a residual sum in
        each stage, learned norm scales and mean instead of maximum pooling before the classes.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        widths: Sequence[int] = (48, 128, 192),
        stem_dim: int = 24,
        accuracy: float | None = None,
    ) -> None:
        super().__init__()
        if len(class_names) < 2:
            raise ValueError(f"class_names must have at least 2 names, got {len(class_names)}")
        if len(widths) != 3:
            raise ValueError(f"widths must have 3 entries, got {len(widths)}")
        self.class_names, self.widths, self.stem_dim = tuple(class_names), tuple(widths), stem_dim
        self.accuracy = accuracy
        self.stem = nn.Conv2d(3, stem_dim, 2)
        self.stages = nn.Sequential(
            *(Stage(*pair) for pair in zip((stem_dim, *self.widths[:-1]), self.widths, strict=True))
        )
        self.classes = nn.Linear(self.feature_dim, len(self.class_names))

    @property
    def feature_dim(self) -> int:
        """Number of features F."""
        return self.widths[-1]

    def features(self, images: Tensor) -> Tensor:
        """Mean of the last activations over all places, (B, F).

        Args:
            images: in [-1, 1], (B, 3, 32, 32), float.

        Raises:
            ValueError: if the shape is another one.
            TypeError: if the images are not floats.
        """
        return self.activations(images)[-1].mean(dim=(2, 3))

    def activations(self, images: Tensor) -> list[Tensor]:
        """What each stage makes of images as `features` takes them: (B, C, 15, 15), (B, C, 7, 7), (B, F, 3, 3)."""
        check_shape("images", images, "B C H W", C=3, H=IMAGE_SIZE, W=IMAGE_SIZE)
        if not images.is_floating_point():
            raise TypeError(f"images must be float in [-1, 1], got {images.dtype}; use vision_ar.data.pixels.normalise")
        found = [F.gelu(self.stem(images))]
        for stage in self.stages:
            found.append(stage(found[-1]))
        return found[1:]

    def forward(self, images: Tensor) -> Tensor:
        """Class logits, (B, num_classes), of images as `features` takes them."""
        return self.classes(self.features(images))


class Stage(nn.Module):
    """Halve the image while changing its channels, then refine it with a residual convolution.

    Args:
        in_dim: channels of the input.
        out_dim: channels of the output.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(in_dim, out_dim, 3, padding=1, bias=False)
        self.down_norm = nn.BatchNorm2d(out_dim)
        self.refine = nn.Conv2d(out_dim, out_dim, 3, padding=1, bias=False)
        self.refine_norm = nn.BatchNorm2d(out_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """Turn (B, in_dim, H, W) into (B, out_dim, H // 2, W // 2)."""
        hidden = F.gelu(self.down_norm(F.max_pool2d(self.down(hidden), 2)))
        return hidden + F.gelu(self.refine_norm(self.refine(hidden)))


def save_classifier(classifier: SmallClassifier, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write weights, sizes, class names and accuracy into one safetensors file.

    Args:
        classifier: to be saved.
        path: of the file; its folder must exist.
        dtype: of the stored weights; counters stay integers.
    """
    weights = {
        name: (value.to(dtype) if value.is_floating_point() else value).contiguous()
        for name, value in classifier.state_dict().items()
    }
    settings = {name: getattr(classifier, name) for name in SETTINGS} | {"feature_dim": classifier.feature_dim}
    save_file(weights, path, {name: json.dumps(value) for name, value in settings.items()})


def load_classifier(path_or_name: str | Path = BUNDLED) -> SmallClassifier:
    """Load a classifier for evaluation: float32, on the CPU, in evaluation mode, without gradients for its weights.

    Args:
        path_or_name: a `.safetensors` file, or the name of a classifier that comes with the package.

    Raises:
        FileNotFoundError: if there is no such file or name.
        ValueError: if the file is not a classifier.
    """
    if Path(path_or_name).suffix == ".safetensors":
        return _read(Path(path_or_name))
    with resources.as_file(resources.files("vision_ar") / "models" / str(path_or_name) / "model.safetensors") as path:
        return _read(path)


def _read(path: Path) -> SmallClassifier:
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a classifier file, got no such file; {MAKE_ONE}")
    try:
        with safe_open(path, framework="pt") as file:
            settings = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file, got {error}") from error
    missing = [name for name in SETTINGS if name not in settings]
    if missing:
        raise ValueError(f"{path} must have {', '.join(SETTINGS)} in its header, got no {missing[0]}; {MAKE_ONE}")
    options: dict[str, Any] = {name: json.loads(settings[name]) for name in SETTINGS}
    classifier = SmallClassifier(**options)
    try:
        classifier.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} must fit widths {classifier.widths}, got weights that do not: {reason}") from error
    return classifier.eval().requires_grad_(False)
