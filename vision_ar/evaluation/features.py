"""Features of a set of images on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vision_ar.evaluation.arrays import ArrayFolder
from vision_ar.evaluation.extractors import Extractor
from vision_ar.evaluation.frechet import RunningMoments
from vision_ar.evaluation.image_files import PixelSet, digest_of, image_hashes
from vision_ar.evaluation.statistics import Statistics

HASH_BYTES = 32


class FeatureStore:
    """What an extractor says about each image of a set, memory-mapped in a folder; see `ArrayFolder`.

    Args:
        folder: made when it is missing.
        pixels: the images.
        extractor: reads them.
        batch_size: images at a time.
    """

    def __init__(self, folder: str | Path, pixels: PixelSet, extractor: Extractor, batch_size: int = 250) -> None:
        self.arrays, self.pixels, self.extractor = ArrayFolder(folder), pixels, extractor
        self.batch_size = batch_size

    def prepare(self) -> None:
        """Make the folder, or check that it belongs to these images; to be called by one process only.

        Raises:
            ValueError: if the folder holds features of another set or extractor.
        """
        extractor, pixels = self.extractor, self.pixels
        layout: dict[str, tuple[tuple, Any]] = {
            "features": ((extractor.feature_dim,), np.float32),
            "logits": ((extractor.num_logits,), np.float32),
            "hashes": ((HASH_BYTES,), np.uint8),
        }
        if extractor.spatial_dim:
            layout["spatial"] = ((extractor.spatial_dim,), np.float32)
        about: dict[str, Any] = {"images": f"{pixels.name} in state {pixels.identity()}"}
        about |= {"extractor": extractor.name, "weights": extractor.digest}
        about |= {"height": pixels.height, "width": pixels.width, "channels": pixels.channels}
        self.arrays.prepare(about, pixels.count, self.batch_size, layout)

    def fill(self, rank: int = 0, world_size: int = 1, advance: Callable[[int], Any] = lambda count: None) -> None:
        """Extract this process's share of what is missing.

        Args:
            rank: of this process.
            world_size: number of processes.
            advance: called with the number of images after every batch that was missing.

        Raises:
            ValueError: if a feature is not finite.
        """
        share = list(self.arrays.batches(rank, world_size))
        missing = [start for start, _, done in share if not done]
        batch_size = self.arrays.about()["batch_size"]
        # one reader for the whole share: a compressed file can only be read from its start
        reader = self.pixels.batches(batch_size, missing[0], share[-1][1]) if missing else iter(())
        for start, stop, done in share:
            pixels = next(reader) if missing and start >= missing[0] else None
            if not done and pixels is not None:
                self.arrays.write(start, self._rows(pixels))
                advance(stop - start)

    def _rows(self, pixels: torch.Tensor) -> dict[str, np.ndarray]:
        found = self.extractor(pixels)
        rows = {"features": found.features, "logits": found.logits}
        if found.spatial is not None:
            rows["spatial"] = found.spatial
        for name, values in rows.items():
            if not values.isfinite().all():
                raise ValueError(f"{name} of {self.pixels.name} must be finite, got others; check the extractor")
        return {name: values.cpu().numpy() for name, values in rows.items()} | {"hashes": image_hashes(pixels)}

    @property
    def features(self) -> np.ndarray:
        """(N, F), float32."""
        return self.arrays.open("features")

    @property
    def logits(self) -> np.ndarray:
        """(N, K), float32."""
        return self.arrays.open("logits")

    def moments(self, name: str = "features") -> RunningMoments:
        """Mean and covariance of an array, features or spatial, read in order, so that they are always the same."""
        array = self.arrays.open(name)
        running = RunningMoments(array.shape[1])
        for start in range(0, len(array), self.batch_size):
            running.update(torch.from_numpy(np.array(array[start : start + self.batch_size])))
        return running

    def digest(self) -> str:
        """Of all images, whatever files they came in; see `image_files.digest_of`."""
        return digest_of(self.arrays.open("hashes"), self.pixels.channels, self.pixels.height, self.pixels.width)

    def statistics(self, **about: Any) -> Statistics:
        """The set as a reference.

        Raises:
            RuntimeError: when features are missing.
        """
        if not self.arrays.complete:
            raise RuntimeError(f"features in {self.arrays.folder} must be complete to be a reference; call fill")
        spatial = self.moments("spatial") if self.extractor.spatial_dim else None
        digest, record = self.digest(), self.arrays.about()
        del record["batch_size"]
        known = {**record, "images": digest, **about}
        return Statistics(self.pixels.name, digest, self.moments(), spatial, self.features, known)
