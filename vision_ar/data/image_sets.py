"""Data sets of whole batches: images in memory, images read one by one, and cached codes."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from vision_ar.data.codes import CachedCodes
from vision_ar.data.pixels import crop_some, flip_some, normalise, uniform_draws
from vision_ar.data.sources import BadImageError, Source

logger = logging.getLogger(__name__)

BadImages = list[tuple[str, str]]


class ImageSet(ABC):
    """Squares of uint8 pixels with labels; bad images are remembered in `bad`, path to reason."""

    def __init__(self) -> None:
        self.bad: dict[str, str] = {}

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def squares(self, indices: Tensor) -> tuple[Tensor, Tensor, BadImages]:
        """Pixels, (B, C, side, side), uint8, labels, (B,), int64, and the bad images met, for indices, (B,)."""

    def report(self, bad: BadImages) -> None:
        """Log and remember bad images, each once."""
        for path, reason in bad:
            if path not in self.bad:
                self.bad[path] = reason
                logger.warning("bad image %s: %s", path, reason)


class MemoryImages(ImageSet):
    """Images that are all decoded at the start; bad ones are left out.

    Args:
        source: of the pictures.
        side: height and width of the squares.
        channels: 3 for RGB, 1 for grey.

    Raises:
        ValueError: if no image is good.
    """

    def __init__(self, source: Source, side: int, channels: int) -> None:
        super().__init__()
        pixels = torch.empty(len(source), channels, side, side, dtype=torch.uint8)
        labels: list[int] = []
        for index in tqdm(range(len(source)), desc="decoding", unit="image", leave=False, delay=2, disable=None):
            try:
                pixels[len(labels)], label = source.square(index, side, channels)
                labels.append(label)
            except BadImageError as error:
                self.report([(error.path, error.reason)])
        if not labels:
            raise _no_good_image(list(self.bad.items()))
        self.pixels, self.labels = pixels[: len(labels)], torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def squares(self, indices: Tensor) -> tuple[Tensor, Tensor, BadImages]:
        """Pixels, labels and no bad images, for indices, (B,)."""
        return self.pixels[indices], self.labels[indices], []


class LazyImages(ImageSet):
    """Images that are decoded whenever they are asked for; the next good one stands in for a bad one.

    Args:
        source: of the pictures.
        side: height and width of the squares.
        channels: 3 for RGB, 1 for grey.

    Raises:
        ValueError: if no image is good.
    """

    def __init__(self, source: Source, side: int, channels: int) -> None:
        super().__init__()
        self.source, self.side, self.channels = source, side, channels
        self.report(self.squares(torch.tensor([0]))[2])

    def __len__(self) -> int:
        return len(self.source)

    def squares(self, indices: Tensor) -> tuple[Tensor, Tensor, BadImages]:
        """Pixels, labels and the bad images that were met, for indices, (B,)."""
        bad: BadImages = []
        found = [self._next_good(index, bad) for index in indices.tolist()]
        return torch.stack([pixels for pixels, _ in found]), torch.tensor([label for _, label in found]), bad

    def _next_good(self, index: int, bad: BadImages) -> tuple[Tensor, int]:
        for step in range(len(self.source)):
            try:
                return self.source.square((index + step) % len(self.source), self.side, self.channels)
            except BadImageError as error:
                bad.append((error.path, error.reason))
        raise _no_good_image(bad)


def _no_good_image(bad: BadImages) -> ValueError:
    first = f"; the first is {bad[0][0]}: {bad[0][1]}" if bad else ""
    return ValueError(f"the set must have an image that can be read, got {len(bad)} bad ones{first}")


class BatchSet(Dataset[Any], ABC):
    """What a loader asks for batches, by keys of `vision_ar.data.sampler`; gives (batch, bad images)."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __getitems__(self, keys: list[int]) -> tuple[dict[str, Tensor], BadImages]:
        """A batch, and the bad images that were met."""

    def __getitem__(self, key: int) -> tuple[dict[str, Tensor], BadImages]:
        """A batch of one."""
        return self.__getitems__([key])

    def report(self, bad: BadImages) -> None:
        """Hear of bad images in the main process."""

    def split_keys(self, keys: list[int]) -> tuple[int, Tensor]:
        """Epoch, the same for a whole batch, and sample indices, (B,)."""
        return keys[0] // len(self), torch.tensor(keys) % len(self)


class ImageBatches(BatchSet):
    """Batches of float images in random or plain views.

    Args:
        images: squares to choose from; for random crops larger than `image_size`.
        image_size: height and width of the views.
        flip: mirror half of the images.
        crop: take random crops.
        seed: of the random views, which are a pure function of (seed, epoch, sample index).
    """

    def __init__(
        self, images: ImageSet, image_size: int, flip: bool = False, crop: bool = False, seed: int = 0
    ) -> None:
        self.images, self.image_size, self.flip, self.crop, self.seed = images, image_size, flip, crop, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[int]) -> tuple[dict[str, Tensor], BadImages]:
        epoch, indices = self.split_keys(keys)
        pixels, labels, bad = self.images.squares(indices)
        draws = uniform_draws(self.seed, epoch, len(self))[indices] if self.flip or self.crop else torch.empty(0, 4)
        if self.flip:
            pixels = flip_some(pixels, draws[:, 0])
        images = normalise(pixels)
        if self.crop:
            images = crop_some(images, draws[:, 1:], self.image_size)
        return {"images": images, "labels": labels}, bad

    def report(self, bad: BadImages) -> None:
        """Log and remember bad images."""
        self.images.report(bad)


class CodeBatches(BatchSet):
    """Batches of cached codes: a random view of every image, or view 0, the plain one.

    Args:
        cached: codes of one split.
        random_view: draw the view anew in every epoch, as a pure function of (seed, epoch, sample index).
        seed: of the draws.
    """

    def __init__(self, cached: CachedCodes, random_view: bool, seed: int) -> None:
        self.cached, self.random_view, self.seed = cached, random_view, seed

    def __len__(self) -> int:
        return len(self.cached)

    def __getitems__(self, keys: list[int]) -> tuple[dict[str, Tensor], BadImages]:
        epoch, indices = self.split_keys(keys)
        variants = torch.zeros_like(indices)
        if self.random_view:
            draws = uniform_draws(self.seed, epoch, len(self))[indices, 0]
            variants = (draws * self.cached.codes.shape[1]).long()
        labels = torch.from_numpy(self.cached.labels[indices.numpy()])
        return {"ids": self.cached.ids(indices, variants), "labels": labels}, []
