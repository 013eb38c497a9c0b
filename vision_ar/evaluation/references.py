"""What samples are compared with: a statistics file, images, or a split of a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vision_ar.data.cache_codes import load_data
from vision_ar.data.image_sets import MemoryImages
from vision_ar.data.images import Digits, ImageDataModule, ImageFolder, Parquet
from vision_ar.data.sources import FolderSource
from vision_ar.evaluation.extractors import Extractor
from vision_ar.evaluation.features import FeatureStore
from vision_ar.evaluation.image_files import PixelSet, identity_of, open_images
from vision_ar.evaluation.protocols import Protocol
from vision_ar.evaluation.statistics import BROKEN, Statistics, load_statistics

Fill = Callable[[FeatureStore], None]
"""Prepares and fills a store, in all processes, with a progress bar."""


class DataPixels(PixelSet):
    """A split of a data set as images to be scored.

    Args:
        data: the data module.
        split: train or val.

    Raises:
        ValueError: when a picture cannot be read: a reference with gaps would be another one.
    """

    def __init__(self, data: ImageDataModule, split: str) -> None:
        self._images, self._source = data.image_set(split, data.image_size), data.source(split)
        self.name, self.lossy = f"{getattr(data, 'root', type(data).__name__)}, split {split}", False
        self.count, self.channels = len(self._images), data.channels
        self.height = self.width = data.image_size
        self.num_classes = data.num_classes
        self._refuse_bad()

    def identity(self) -> str:
        """Of all pixels where they are in memory, else of the names, sizes and times of the pictures."""
        if isinstance(self._images, MemoryImages):
            return self.digest()
        if isinstance(self._source, FolderSource):
            return identity_of(file for file, _ in self._source.files)
        names = "\n".join(self._source.where(index) for index in range(self.count))
        return hashlib.sha256(names.encode()).hexdigest()[:16]

    def labelled(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Pixels (B, C, H, W), uint8, and class ids (B,) of some images."""
        pixels, labels, bad = self._images.squares(torch.arange(start, stop))
        self._images.report(bad)
        self._refuse_bad()
        return pixels, labels

    def _batches(self, batch_size: int, start: int, stop: int) -> Iterator[Tensor]:
        for first in range(start, stop, batch_size):
            yield self.labelled(first, min(first + batch_size, stop))[0]

    def _refuse_bad(self) -> None:
        for path, reason in self._images.bad.items():
            raise ValueError(f"data must hold whole pictures only, {path} is not: {reason}")


def open_data(text: str, image_size: int, channels: int) -> ImageDataModule:
    """A data module from what a user names.

    Args:
        text: `digits`, a folder of Parquet files, a folder of class folders, or a YAML file with a data section.
        image_size: of the images.
        channels: of the images.

    Raises:
        FileNotFoundError: if there is no such folder or file.
    """
    if text == "digits":
        return Digits(image_size=image_size, channels=channels)
    path = Path(text)
    if path.is_file():
        data = load_data(text)
        data.image_size, data.channels = image_size, channels  # type: ignore[assignment]
        return data
    if not path.is_dir():
        raise FileNotFoundError(
            f"data must be digits, a folder of images or a YAML file with a data section, got {text}"
        )
    kind: Any = Parquet if any(path.glob("*.parquet")) else ImageFolder
    return kind(root=text, image_size=image_size, channels=channels)


def find_reference(
    reference: str | None, data: str | None, protocol: Protocol, extractor: Extractor, folder: Path, fill: Fill
) -> Statistics:
    """The reference of a protocol, extracted into the folder when it comes as images.

    Args:
        reference: statistics file, folder or .npz of images; None takes the data.
        data: see `open_data`; used without a reference.
        protocol: says which split, and which digests are known.
        extractor: reads images.
        folder: for features.
        fill: see `Fill`.

    Raises:
        ValueError: if there is none, it was made with another extractor, or it is not the one of the protocol.
    """
    if reference is not None:
        if data is not None:
            raise ValueError("data must be left out beside reference: only one of them is compared with")
        found = read_reference(reference, protocol, extractor, folder, fill)
    elif data is None or protocol.split == "none":
        wanted = "reference" if protocol.split == "none" else "data"
        raise ValueError(f"{wanted} must be given for protocol {protocol.name}: {protocol.reference}")
    else:
        pixels = DataPixels(open_data(data, protocol.image_size, protocol.channels), protocol.split)
        found = statistics_of(pixels, extractor, folder, fill)
    found.about["known_as"] = known_as(protocol, found.name, found.digest, found.about.get("images"))
    return found


def known_as(protocol: Protocol, name: str, *digests: str | None) -> str | None:
    """What a protocol calls a reference with one of these digests, None when it does not know it.

    Raises:
        ValueError: if it knows all that there are.
    """
    known = dict(protocol.reference_digests)
    for digest in digests:
        if digest in known:
            return known[digest]
    if protocol.closed:
        listed = ", ".join(f"{digest} ({what})" for digest, what in known.items())
        raise ValueError(
            f"reference of {protocol.name} must have digest {listed}, got {digests[-1] or digests[0]} of {name}; "
            "--reference-hash DIGEST scores against another one and says so in the result"
        )
    return None


def read_reference(path: str, protocol: Protocol, extractor: Extractor, folder: Path, fill: Fill) -> Statistics:
    """A reference from a path; an .npz of the ADM evaluator has both moments and images, and both are used."""
    if not Path(path).exists():
        raise FileNotFoundError(f"reference must be a file or folder that exists, got {path}; see make-reference")
    if not has_moments(path):
        return statistics_of(checked_images(path, protocol), extractor, folder, fill)
    found = load_statistics(path)
    made_by, weights = found.about.get("extractor"), found.about.get("weights")
    wanted = f"reference must be made with extractor {extractor.name} {extractor.digest}"
    if made_by is None and extractor.name != "inception":
        raise ValueError(f"{wanted}, {path} does not say what it was made with, as only files of Inception do")
    if made_by is not None and (made_by, weights) != (extractor.name, extractor.digest):
        raise ValueError(f"{wanted}, {path} was made with {made_by} {weights}")
    if len(found.moments.mean) != extractor.feature_dim:
        raise ValueError(f"reference must have {extractor.feature_dim} features, {path} has {len(found.moments.mean)}")
    if found.features is None and has_images(path):
        images = statistics_of(checked_images(path, protocol), extractor, folder, fill)
        return replace(found, features=images.features)
    size = protocol.image_size
    if found.about and (found.about.get("height"), found.about.get("width")) != (size, size):
        shape = f"{found.about.get('height')} x {found.about.get('width')}"
        raise ValueError(f"reference must be of {size} x {size} images, {path} is of {shape}")
    return found


def checked_images(path: str, protocol: Protocol) -> PixelSet:
    """Images of the size that a protocol scores.

    Raises:
        ValueError: if they have another one.
    """
    pixels, size = open_images(path), protocol.image_size
    if (pixels.height, pixels.width, pixels.channels) != (size, size, protocol.channels):
        found = f"{pixels.height} x {pixels.width} with {pixels.channels} channels in {pixels.name}"
        raise ValueError(f"images must be {size} x {size} with {protocol.channels} channels, got {found}")
    return pixels


def statistics_of(pixels: PixelSet, extractor: Extractor, folder: Path, fill: Fill) -> Statistics:
    """Features of images, extracted into the folder."""
    store = FeatureStore(folder, pixels, extractor)
    fill(store)
    return store.statistics()


def has_moments(path: str) -> bool:
    """True for a file of statistics."""
    return Path(path).suffix in (".pt", ".pth") or "mu" in members(path)


def has_images(path: str) -> bool:
    """True for a file of images."""
    return "arr_0" in members(path)


def members(path: str) -> list[str]:
    """Names of the arrays of an .npz; empty for anything else."""
    if Path(path).suffix != ".npz" or not Path(path).is_file():
        return []
    try:
        with np.load(path, allow_pickle=False) as file:
            return list(file.files)
    except BROKEN as error:
        raise ValueError(f"{path} must be a whole .npz file, got: {error}") from error
