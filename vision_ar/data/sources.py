"""Where labelled pictures come from: folders, Parquet files, torchvision and scikit-learn."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vision_ar.data.pixels import to_square

SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
TRAIN_NAMES = ("train", "trainval")
VAL_NAMES = ("val", "valid", "test")


class BadImageError(ValueError):
    """A picture that cannot be read: its `path` and the `reason`, one line each."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class Source(ABC):
    """Pictures with class ids, read one at a time. Subclasses set `class_names`."""

    class_names: list[str]

    @abstractmethod
    def __len__(self) -> int:
        """Number of pictures, good and bad."""

    @abstractmethod
    def read(self, index: int) -> tuple[Image.Image, int]:
        """Picture and class id; raises anything when the picture is bad."""

    @abstractmethod
    def where(self, index: int) -> str:
        """What to call a picture in a message: a path, or a row of a file."""

    def square(self, index: int, side: int, channels: int) -> tuple[Tensor, int]:
        """Pixels, (C, side, side), uint8, and class id.

        Raises:
            BadImageError: when the picture cannot be read.
        """
        try:
            image, label = self.read(index)
            return to_square(image, side, channels), label
        except UnidentifiedImageError as error:
            raise BadImageError(self.where(index), "not an image that Pillow can read") from error
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and others
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadImageError(self.where(index), reason) from error


class FolderSource(Source):
    """Image files with their class ids."""

    def __init__(self, files: Sequence[tuple[Path, int]], class_names: list[str]) -> None:
        self.files, self.class_names = files, class_names

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Open a file."""
        path, label = self.files[index]
        return Image.open(io.BytesIO(path.read_bytes())), label

    def where(self, index: int) -> str:
        """Path of the file."""
        return str(self.files[index][0])


def class_folders(root: Path) -> list[str]:
    """Names of the sub-folders that hold image files, sorted.

    Raises:
        ValueError: if there is none.
    """
    names = sorted(child.name for child in root.iterdir() if child.is_dir() and any(_image_files(child)))
    if not names:
        raise ValueError(f"{root} must have class sub-folders with images, got none; put files in {root}/<class>/")
    return names


def has_split_folders(root: Path) -> bool:
    """True when `root` holds train and val rather than class sub-folders.

    Raises:
        ValueError: if only one of the two is there and it holds folders, so that it can hardly be a class.
    """
    found = [folder for folder in (root / "train", root / "val") if folder.is_dir()]
    if len(found) == 1 and any(child.is_dir() for child in found[0].iterdir()):
        raise ValueError(f"{root} must have both train and val, got only {found[0].name}; add the other one")
    return len(found) == 2


def labelled_files(root: Path, class_names: list[str]) -> list[tuple[Path, int]]:
    """All image files under the class sub-folders of `root` with their class ids, sorted by path."""
    return [(path, label) for label, name in enumerate(class_names) for path in _image_files(root / name)]


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def split_files(files: list[tuple[Path, int]], root: Path, val_share: float) -> dict[str, list[tuple[Path, int]]]:
    """Take a share of the files for validation, chosen by a hash of their paths below `root` and by nothing else."""

    def rank(entry: tuple[Path, int]) -> bytes:
        return hashlib.blake2b(entry[0].relative_to(root).as_posix().encode(), digest_size=8).digest()

    if len(files) < 2:
        raise ValueError(f"{root} must hold at least 2 images to split off a validation set, got {len(files)}")
    num_val = min(max(1, round(val_share * len(files))), len(files) - 1)
    val = set(sorted(files, key=rank)[:num_val])
    return {"train": [entry for entry in files if entry not in val], "val": sorted(val)}


class ParquetSource(Source):
    """Rows of Parquet files, image = struct(bytes, path) and label = int64; the encoded bytes are kept in memory.

    Args:
        files: Parquet files in order.
        class_names: names of the class ids 0, 1, ...

    Raises:
        ValueError: if a column is missing or a label is not the id of a class.
    """

    def __init__(self, files: list[Path], class_names: list[str]) -> None:
        self.files, self.class_names = files, class_names
        self.labels = np.concatenate([parquet_labels(path, len(class_names)) for path in files])

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def _images(self) -> Any:
        parquet, arrow = require("pyarrow.parquet", "pyarrow"), require("pyarrow", "pyarrow")
        return arrow.concat_tables([parquet.read_table(path, columns=["image"]) for path in self.files])["image"]

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Open the bytes of a row."""
        row = self._images[index].as_py()
        if not row or not row["bytes"]:
            raise ValueError("the row has no image bytes")
        return Image.open(io.BytesIO(row["bytes"])), int(self.labels[index])

    def where(self, index: int) -> str:
        """Row, counted over all files of the split, and the path stored in it."""
        path = (self._images[index].as_py() or {}).get("path")
        split = self.files[0].name.split("-")[0]
        return f"row {index} of {self.files[0].parent / split}" + (f" ({path})" if path else "")


def parquet_labels(path: Path, num_classes: int | None = None) -> np.ndarray:
    """The label column of a file, (N,), int64, checked; None allows any class id from 0."""
    parquet = require("pyarrow.parquet", "pyarrow")
    columns = parquet.read_schema(path)
    kinds = [str(field.type) for name in ("image", "label") for field in columns if field.name == name]
    if len(kinds) < 2 or "bytes: binary" not in kinds[0]:
        found = ", ".join(f"{field.name}: {field.type}" for field in columns)
        raise ValueError(f"{path} must have columns image: struct(bytes, path) and label: int64, got {found}")
    values = parquet.read_table(path, columns=["label"])["label"].to_pylist()
    for row, value in enumerate(values):
        if not isinstance(value, int) or value < 0 or (num_classes is not None and value >= num_classes):
            wanted = "at least 0" if num_classes is None else f"between 0 and {num_classes - 1}"
            raise ValueError(f"label of row {row} of {path} must be {wanted}, got {value}")
    return np.array(values, dtype=np.int64)


def parquet_class_names(files: list[Path]) -> list[str]:
    """Class names from the Hugging Face metadata of the first file, or numbers up to the largest label."""
    metadata = require("pyarrow.parquet", "pyarrow").read_schema(files[0]).metadata or {}
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get("label", {}).get("names")
    if names:
        return [str(name) for name in names]
    largest = max((int(labels.max()) for path in files if len(labels := parquet_labels(path))), default=-1)
    return [str(label) for label in range(largest + 1)]


class TorchvisionSource(Source):
    """One split of a torchvision data set whose items are (picture, class id)."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name
        names = getattr(dataset, "classes", None)  # most sets have it, some do not
        if names is None:
            names = [str(label) for label in range(1 + max(int(dataset[index][1]) for index in range(len(dataset))))]
        self.class_names = [name if isinstance(name, str) else str(name[0]) for name in names]

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Take an item of the set."""
        image, label = self.dataset[index]
        return image, int(label)

    def where(self, index: int) -> str:
        """Name and index."""
        return f"{self.name}[{index}]"


def torchvision_set(name: str, root: str, train: bool) -> Any:
    """Build and, if needed, download one split of `torchvision.datasets.<name>`.

    Raises:
        ValueError: if torchvision has no such set, or the set has no split for training and validation.
        ConnectionError: if the files are not there and cannot be downloaded.
    """
    builder = getattr(importlib.import_module("torchvision.datasets"), name, None)
    if not inspect.isclass(builder):
        raise ValueError(f"name must be that of a torchvision data set, for instance CIFAR10, got {name!r}")
    parameters = inspect.signature(builder).parameters
    if "download" not in parameters or not {"train", "split"} & set(parameters):
        raise ValueError(f"name must be a torchvision set with download and a train or split option, got {name!r}")
    options: list[dict[str, Any]] = [{"split": split} for split in (TRAIN_NAMES if train else VAL_NAMES)]
    return _first_that_fits(builder, name, root, [{"train": train}] if "train" in parameters else options)


def _first_that_fits(builder: Any, name: str, root: str, options: list[dict[str, Any]]) -> Any:
    """Sets name their splits differently and refuse other names with a ValueError before they download."""
    refusal = None
    for option in options:
        try:
            return builder(root, download=True, **option)
        except ValueError as error:
            refusal = error
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            advice = "connect to a network once, or put its files there"
            raise ConnectionError(f"{name} is not in {root} and cannot be downloaded ({reason}); {advice}") from error
    raise ValueError(f"{name} has none of the splits {options}: {refusal}")


class ArraySource(Source):
    """Grey pictures in an array, (N, H, W), uint8, with class ids, (N,)."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, class_names: list[str], name: str) -> None:
        self.pixels, self.labels, self.class_names, self.name = pixels, labels, class_names, name

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Take a row of the array."""
        return Image.fromarray(self.pixels[index]), int(self.labels[index])

    def where(self, index: int) -> str:
        """Name and index."""
        return f"{self.name}[{index}]"


def require(module: str, package: str) -> Any:
    """Import an optional module, or say in one line what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this data needs {package}, which is not installed; run: pip install {package}") from error
