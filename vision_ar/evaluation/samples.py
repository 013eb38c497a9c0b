"""Samples of a model for scoring: made once, kept on disk as pixels, in any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vision_ar.evaluation.arrays import ArrayFolder
from vision_ar.evaluation.image_files import PixelSet, open_images
from vision_ar.evaluation.protocols import Protocol, fit_size, labels_for, round_pixels
from vision_ar.interfaces import ImageTokenizer
from vision_ar.pipeline import Pipeline

PIXELS = "pixels"


class SampleStore:
    """The samples that a protocol asks of a model, in a folder; see `ArrayFolder`.

    Sample i has seed + i and a class that depends on i and the seed alone, so that the set is the same in any number of
    processes, with any batch size and after any interruption.

    Args:
        folder: made when it is missing.
        pipe: the model.
        protocol: how many, which classes, how they are rounded.
        settings: of the sampler, all of them; see `pipeline.Settings`.
        seed: of sample 0.
        num_samples: fewer than the protocol asks, for a trial; None for all.
        batch_size: samples at a time.

    Raises:
        ValueError: if the model makes no images, or the protocol asks for none.
    """

    def __init__(
        self,
        folder: str | Path,
        pipe: Pipeline,
        protocol: Protocol,
        settings: dict[str, Any],
        seed: int = 0,
        num_samples: int | None = None,
        batch_size: int = 64,
    ) -> None:
        if protocol.kind != "generation":
            raise ValueError(f"protocol must be one of generation, got {protocol.name}, which is for tokenizers")
        if not isinstance(pipe.tokenizer, ImageTokenizer):
            raise ValueError(f"model must make images, got one with a {type(pipe.tokenizer).__name__}")
        if protocol.resize == "none" and pipe.tokenizer.image_size != protocol.image_size:
            raise ValueError(
                f"model must make images of {protocol.image_size} pixels for protocol {protocol.name}, "
                f"got {pipe.tokenizer.image_size}"
            )
        if pipe.tokenizer.channels != protocol.channels:
            raise ValueError(
                f"model must make images with {protocol.channels} channels for protocol {protocol.name}, "
                f"got {pipe.tokenizer.channels}"
            )
        self.arrays, self.pipe, self.protocol = ArrayFolder(folder), pipe, protocol
        self.settings, self.seed, self.batch_size = settings, seed, batch_size
        self.count = protocol.num_samples if num_samples is None else num_samples
        self.channels = pipe.tokenizer.channels

    @property
    def labels(self) -> list[int]:
        """Class of every sample."""
        return labels_for(self.protocol.labels, self.count, max(1, self.pipe.num_classes), self.seed)

    def prepare(self) -> None:
        """Make the folder, or check that it was begun for the same samples; to be called by one process only.

        Raises:
            ValueError: if it was begun with another model or other settings.
        """
        size = self.protocol.image_size
        about = {"model": self.pipe.name, "hash": self.pipe.digest, "protocol": self.protocol.name, "seed": self.seed}
        about |= {name: str(value) for name, value in self.settings.items()}
        about |= self.pipe.weights()
        layout = {PIXELS: ((size, size, self.channels), np.uint8)}
        self.arrays.prepare(about, self.count, self.batch_size, layout)

    def fill(self, rank: int = 0, world_size: int = 1, advance: Callable[[int], Any] = lambda count: None) -> None:
        """Make this process's share of what is missing; `advance` as in `FeatureStore.fill`.

        Raises:
            ValueError: if the model makes images with NaN, or of a size that the protocol does not take.
        """
        labels = self.labels
        for start, stop, done in self.arrays.batches(rank, world_size):
            if not done:
                seeds = list(range(self.seed + start, self.seed + stop))
                samples = self.pipe.sample(labels[start:stop], seeds, batch_size=stop - start, **self.settings)
                if bad := samples.images.isnan().flatten(1).any(dim=1).nonzero().flatten().tolist():
                    raise ValueError(f"samples must be numbers, got NaN in the one of seed {seeds[bad[0]]}")
                images = fit_size(samples.images, self.protocol.image_size, self.protocol.resize)
                pixels = round_pixels(images, self.protocol.rounding).permute(0, 2, 3, 1)
                self.arrays.write(start, {PIXELS: pixels.cpu().numpy()})
                advance(stop - start)

    def pixels(self) -> PixelSet:
        """The finished samples.

        Raises:
            RuntimeError: when some are missing.
        """
        if not self.arrays.complete:
            raise RuntimeError(f"samples in {self.arrays.folder} must be complete before they are scored; call fill")
        return open_images(self.arrays.folder / f"{PIXELS}.npy")


def shown(pixels: PixelSet, count: int = 64) -> torch.Tensor:
    """The first images of a set, in [-1, 1], for a grid."""
    (first,) = pixels.batches(count, 0, min(count, pixels.count))
    return first.float() / 127.5 - 1
