"""Data modules for labelled images: folders, Parquet files, torchvision sets, and digits that need no file.

Every batch is a dictionary: `images`, (B, C, H, W), float32 in [-1, 1], and `labels`, (B,), int64. With `codes` set it
holds `ids`, (B, T), int64, in place of images.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch

from vision_ar.data.codes import CachedCodes
from vision_ar.data.image_sets import BatchSet, CodeBatches, ImageBatches, ImageSet, LazyImages, MemoryImages
from vision_ar.data.pixels import MIN_CROP
from vision_ar.data.sampler import EpochSampler, ResumableLoader
from vision_ar.data.sources import (
    ArraySource,
    FolderSource,
    ParquetSource,
    Source,
    TorchvisionSource,
    class_folders,
    has_split_folders,
    labelled_files,
    parquet_class_names,
    require,
    split_files,
    torchvision_set,
)

logger = logging.getLogger(__name__)

MEMORY_LIMIT = 2 << 30
"""Bytes of uint8 pixels up to which a split is decoded once and kept; larger ones are decoded whenever read."""
NUM_TRAIN_DIGITS = 1500


class ImageDataModule(L.LightningDataModule, ABC):
    """Deliver batches of labelled images. Subclasses say where the pictures come from.

    Args:
        image_size: height and width of the images; the central square of a picture is resized to it.
        batch_size: images in a batch, in each process.
        num_workers: processes that prepare batches; 0 is best for sets that fit into memory.
        channels: 3 for RGB, 1 for grey.
        flip: mirror half of the training images.
        crop: center, or random for training crops with 0.8 to 1.0 of the side of the central square.
        codes: folder of tokens made by `python -m vision_ar.data.cache_codes`; batches then hold ids and no images, in
            the views that were cached.
        seed: of the order of the training images and of their random views.
        drop_last: leave out the last training batch of an epoch when it is smaller than the others.
    """

    def __init__(
        self,
        image_size: int = 32,
        batch_size: int = 64,
        num_workers: int = 0,
        channels: Literal[1, 3] = 3,
        flip: bool = False,
        crop: Literal["center", "random"] = "center",
        codes: str | None = None,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        bounds = (("image_size", image_size, 1), ("batch_size", batch_size, 1), ("num_workers", num_workers, 0))
        for name, value, least in bounds:
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        if crop not in ("center", "random"):
            raise ValueError(f"crop must be center or random, got {crop!r}")
        self.image_size, self.batch_size, self.channels = image_size, batch_size, channels
        self.num_workers, self.flip, self.crop, self.codes = num_workers, flip, crop, codes
        self.seed, self.drop_last = seed, drop_last
        self._image_sets: dict[tuple[str, int], ImageSet] = {}
        self._class_names: list[str] | None = None

    @abstractmethod
    def source(self, split: str) -> Source:
        """Where the pictures of a split, train or val, come from; both have the same class names."""

    @property
    def class_names(self) -> list[str]:
        """Name of each class id."""
        if self._class_names is None:
            cached = None if self.codes is None else self.cached_codes("train").record
            self._class_names = cached.class_names if cached else self.source("train").class_names
        return self._class_names

    @property
    def num_classes(self) -> int:
        """Number of class ids."""
        return len(self.class_names)

    @property
    def bad_images(self) -> list[tuple[str, str]]:
        """Path and reason of every picture that could not be read so far."""
        bad = {path: reason for images in self._image_sets.values() for path, reason in images.bad.items()}
        return list(bad.items())

    def image_set(self, split: str, side: int) -> ImageSet:
        """Pictures of a split as uint8 squares, decoded at the first call when they fit into memory."""
        if (split, side) not in self._image_sets:
            source = self.source(split)
            self._class_names = source.class_names
            fits = len(source) * self.channels * side**2 <= MEMORY_LIMIT
            logger.info("%s %s images of split %s", "decoding" if fits else "opening", len(source), split)
            kind = MemoryImages if fits else LazyImages
            self._image_sets[split, side] = kind(source, side, self.channels)
        return self._image_sets[split, side]

    def cached_codes(self, split: str) -> CachedCodes:
        """Cached codes of a split; `record.tokenizer` is the fingerprint of the tokenizer that made them."""
        if self.codes is None:
            raise RuntimeError("codes must be set to read cached codes, got None")
        return CachedCodes(self.codes, split)

    def setup(self, stage: str | None = None) -> None:
        """Open what the stage needs."""
        for split in ("train", "val") if stage in ("fit", None) else ("val",):
            self._batches(split)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches; a run that is resumed within an epoch goes on where it stopped."""
        loader = self._loader("train")
        if len(loader) == 0:
            most = len(loader.sampler)  # type: ignore[arg-type]
            raise ValueError(f"batch_size must be at most {most} with drop_last and this set, got {self.batch_size}")
        if (trainer := self.trainer) is not None:
            progress = trainer.fit_loop.epoch_loop.batch_progress
            loader.processed_fn = lambda: progress.current.processed  # type: ignore[attr-defined]
        return loader

    def val_dataloader(self) -> ResumableLoader:
        """All validation images in order, plain views."""
        return self._loader("val")

    def test_dataloader(self) -> ResumableLoader:
        """The validation images."""
        return self._loader("val")

    def _batches(self, split: str) -> BatchSet:
        train = split == "train"
        if self.codes is not None:
            return CodeBatches(self.cached_codes(split), random_view=train, seed=self.seed)
        crop = train and self.crop == "random"
        images = self.image_set(split, math.ceil(self.image_size / MIN_CROP) if crop else self.image_size)
        return ImageBatches(images, self.image_size, flip=train and self.flip, crop=crop, seed=self.seed)

    def _loader(self, split: str) -> ResumableLoader:
        train, batches = split == "train", self._batches(split)
        drop_last = train and self.drop_last
        processes = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        return ResumableLoader(
            batches,
            batch_size=self.batch_size,
            sampler=EpochSampler(len(batches), train, self.seed, drop_last, **processes),
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            drop_last=drop_last,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # its own, so that loading never moves the global random state
        )


def _as_it_is(batch: Any) -> Any:
    """Collation of data sets that give whole batches."""
    return batch


class ImageFolder(ImageDataModule):
    """Images in class sub-folders, `root/<class>/...`, or in `root/train/<class>/...` and `root/val/<class>/...`.

    Files count as images by their suffix: bmp, gif, jpg, jpeg, pgm, png, ppm, tif, tiff and webp.

    Args:
        root: the folder.
        val_share: share of the images taken for validation, chosen by their paths; unused with train and val folders.
        **common: see ImageDataModule.

    Raises:
        FileNotFoundError: if the folder is missing.
        ValueError: if it holds no images, or unknown classes in val.
    """

    def __init__(self, root: str, val_share: float = 0.1, **common: Any) -> None:
        super().__init__(**common)
        if not 0 < val_share < 1:
            raise ValueError(f"val_share must be between 0 and 1, got {val_share}")
        self.root, self.val_share = root, val_share

    def source(self, split: str) -> Source:
        """The image files of a split."""
        root = Path(self.root)
        if not root.is_dir():
            raise FileNotFoundError(f"root must be a folder, got {root}; make it and put images in {root}/<class>/")
        if not has_split_folders(root):
            names = class_folders(root)
            return FolderSource(split_files(labelled_files(root, names), root, self.val_share)[split], names)
        names = class_folders(root / "train")
        unknown = set(class_folders(root / split)) - set(names)
        if unknown:
            raise ValueError(
                f"{root}/{split} must have the classes of {root}/train, got also {', '.join(sorted(unknown))}"
            )
        return FolderSource(labelled_files(root / split, names), names)


class Parquet(ImageDataModule):
    """Images in Parquet files, train-*.parquet with validation-*.parquet or else test-*.parquet.

    The columns are image = struct(bytes, path) and label = int64, as the Hugging Face data sets have them. The encoded
    images of a split are kept in memory; use ImageFolder for sets that are larger than the memory.

    Args:
        root: folder of the files.
        **common: see ImageDataModule.

    Raises:
        FileNotFoundError: if the folder or the files of a split are missing.
        ValueError: if columns are missing or a label is not the id of a class.
    """

    def __init__(self, root: str, **common: Any) -> None:
        super().__init__(**common)
        self.root = root

    def source(self, split: str) -> Source:
        """The rows of a split."""
        root = Path(self.root)
        patterns = ["train-*.parquet"] if split == "train" else ["validation-*.parquet", "test-*.parquet"]
        found = [files for pattern in patterns if (files := sorted(root.glob(pattern)))]
        if not found:
            raise FileNotFoundError(f"{root} must hold {' or '.join(patterns)}, got no such file; check root")
        return ParquetSource(found[0], parquet_class_names(sorted(root.glob("train-*.parquet")) or found[0]))


class Torchvision(ImageDataModule):
    """A set of torchvision by its name, downloaded at the first use.

    Args:
        name: class in torchvision.datasets with a train or split option, for instance CIFAR10.
        root: folder of the downloaded files.
        **common: see ImageDataModule.

    Raises:
        ValueError: if there is no such set.
        ConnectionError: if the set is not in `root` and cannot be downloaded.
    """

    def __init__(self, name: str, root: str = "data", **common: Any) -> None:
        super().__init__(**common)
        self.set_name, self.root = name, root

    def prepare_data(self) -> None:
        """Download the set, in one process only."""
        if self.codes is None:
            for split in ("train", "val"):
                self.source(split)

    def source(self, split: str) -> Source:
        """The items of a split."""
        return TorchvisionSource(
            torchvision_set(self.set_name, self.root, split == "train"), f"{self.set_name}/{split}"
        )


class Digits(ImageDataModule):
    """The 1797 handwritten digits, 8x8, that come with scikit-learn: 1500 for training, 297 for validation.

    Args:
        **common: see ImageDataModule.
    """

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)

    def source(self, split: str) -> Source:
        """The first 1500 digits or the others."""
        part = slice(None, NUM_TRAIN_DIGITS) if split == "train" else slice(NUM_TRAIN_DIGITS, None)
        pixels, labels = _load_digits()
        return ArraySource(pixels[part], labels[part], [str(digit) for digit in range(10)], f"digits/{split}")


@cache
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels, (1797, 8, 8), uint8, and labels, (1797,)."""
    digits = require("sklearn.datasets", "scikit-learn").load_digits()
    return (digits.images * (255 / 16)).round().astype(np.uint8), digits.target
