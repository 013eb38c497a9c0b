"""How close reconstructed images are to the originals, and what a tokenizer makes of a whole set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from vision_ar.data.pixels import normalise
from vision_ar.evaluation.arrays import ArrayFolder
from vision_ar.evaluation.image_files import PixelSet, open_images
from vision_ar.evaluation.protocols import Protocol, round_pixels
from vision_ar.interfaces import ImageTokenizer
from vision_ar.layers.perceptual import load_lpips
from vision_ar.shapes import check_shape

DATA_RANGE = 2.0
"""Largest minus smallest value of an image."""


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Measure the peak signal-to-noise ratio of every image in dB, (B,), float32; equal images give infinity.

    Args:
        images: reconstructions, (B, C, H, W), float; clamped to [-1, 1] first.
        reference: originals in [-1, 1], same shape, float; clamped likewise.

    Raises:
        ValueError: if the shapes differ or are not (B, C, H, W).
        TypeError: if either is not float.

    Source:
        Ten times the decimal logarithm of the squared data range, 4, over the mean squared error of all C H W values.
    """
    images, reference = checked_pair(images, reference)
    return 10 * (DATA_RANGE**2 / (images - reference).square().mean(dim=(1, 2, 3))).log10()


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Measure the structural similarity of every image, (B,), float32; arguments and errors are those of `psnr`.

    Source:
        Wang et al. 2004: Gaussian window of 11 pixels with deviation 1.5, mean over channels, of intensities from 0 up;
        torchmetrics computes it, with mirrored borders where Wang et al. leave them out. Papers that use
        scikit-image's default, a flat window of 7, get other values.
    """
    images, reference = ((side + 1) / DATA_RANGE for side in checked_pair(images, reference))  # its constants want 0 up
    return structural_similarity_index_measure(images, reference, data_range=1.0, reduction="none")  # type: ignore[return-value]


def checked_pair(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 and clamped, after a check of shapes and kinds."""
    check_shape("images", images, "B C H W")
    if reference.shape != images.shape:
        raise ValueError(
            f"reference must have shape {tuple(images.shape)}, as images have, got {tuple(reference.shape)}"
        )
    for name, value in (("images", images), ("reference", reference)):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be float in [-1, 1], got {value.dtype}; use vision_ar.data.pixels.normalise")
    return images.float().clamp(-1, 1), reference.float().clamp(-1, 1)


def codebook_use(ids: np.ndarray, vocab_size: int) -> tuple[float, float]:
    """Share of the ids that occur, and the perplexity exp(entropy) of their frequencies.

    Args:
        ids: tokens, (N, T).
        vocab_size: number of ids.
    """
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(ids), 1000):
        counts += np.bincount(ids[start : start + 1000].ravel(), minlength=vocab_size)
    probs = torch.from_numpy(counts / counts.sum())
    return float((counts > 0).mean()), float(torch.exp(-torch.xlogy(probs, probs).sum()))


class ReconstructionStore:
    """A set of images through a tokenizer and back, in a folder; see `ArrayFolder`.

    Args:
        folder: made when it is missing.
        tokenizer: of images, in evaluation mode.
        digest: of its weights.
        originals: the images.
        protocol: says how reconstructions are rounded.
        lpips: also measure LPIPS, which needs VGG weights.
        batch_size: images at a time.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: ImageTokenizer,
        digest: str,
        originals: PixelSet,
        protocol: Protocol,
        lpips: bool = False,
        batch_size: int = 64,
    ) -> None:
        self.arrays, self.tokenizer, self.digest, self.originals = ArrayFolder(folder), tokenizer, digest, originals
        self.protocol, self.batch_size = protocol, batch_size
        self._lpips = load_lpips().eval().requires_grad_(False) if lpips else None

    def prepare(self) -> None:
        """Make the folder, or check that it was begun for the same images and tokenizer; by one process only."""
        spec, images = self.tokenizer.spec, self.originals
        about = {"tokenizer": self.digest, "images": f"{images.name} in state {images.identity()}"}
        about |= {"protocol": self.protocol.name}
        layout: dict[str, tuple[tuple, Any]] = {
            "pixels": ((images.height, images.width, images.channels), np.uint8),
            "psnr": ((len(spec.groups),), np.float32),
            "ssim": ((), np.float32),
        }
        if spec.vocab_size is not None:
            layout["ids"] = ((spec.seq_len,), np.int32)
        if self._lpips is not None:
            layout["lpips"] = ((), np.float32)
        self.arrays.prepare({**about, "arrays": sorted(layout)}, images.count, self.batch_size, layout)

    @torch.inference_mode()
    def fill(self, rank: int = 0, world_size: int = 1, advance: Callable[[int], Any] = lambda count: None) -> None:
        """Rebuild this process's share of what is missing; `advance` as in `FeatureStore.fill`."""
        device = next(self.tokenizer.parameters()).device
        for start, stop, done in self.arrays.batches(rank, world_size):
            if not done:
                (pixels,) = self.originals.batches(stop - start, start, stop)
                self.arrays.write(start, self._rows(normalise(pixels.to(device))))
                advance(stop - start)

    def _rows(self, images: Tensor) -> dict[str, np.ndarray]:
        tokens = self.tokenizer.encode(images)
        preview = self.tokenizer.open_preview(len(images))
        written = tokens.ids if tokens.ids is not None else tokens.latents
        assert written is not None
        frames = [preview.feed(part) for part in written.split(list(self.tokenizer.spec.groups), dim=1)]
        rounded = [None if frame is None else round_pixels(frame, self.protocol.rounding) for frame in frames]
        pixels, nothing = rounded[-1], torch.full((len(images),), torch.nan)
        assert pixels is not None  # after all groups there is an image
        after = [nothing if frame is None else psnr(normalise(frame), images).cpu() for frame in rounded]
        rows = {
            "pixels": pixels.permute(0, 2, 3, 1),
            "psnr": torch.stack(after, dim=1),
            "ssim": ssim(normalise(pixels), images),
        }
        if tokens.ids is not None:
            rows["ids"] = tokens.ids.int()
        if self._lpips is not None:
            rows["lpips"] = self._lpips.to(images.device)(normalise(pixels), images).flatten()
        return {name: values.cpu().numpy() for name, values in rows.items()}

    def pixels(self) -> PixelSet:
        """The reconstructions."""
        return open_images(self.arrays.folder / "pixels.npy")

    def scores(self) -> dict[str, float]:
        """Means over all images: PSNR after each group, SSIM, LPIPS, use of the codebook."""
        after = np.asarray(self.arrays.open("psnr"), np.float64).mean(axis=0)
        found = {
            f"psnr_{end}_tokens": float(value)
            for end, value in zip(self.tokenizer.spec.ends[:-1], after[:-1], strict=True)
            if not np.isnan(value)
        }
        found["psnr"] = float(after[-1])
        for name in ("ssim", "lpips"):
            if (self.arrays.folder / f"{name}.npy").is_file():
                found[name] = float(np.asarray(self.arrays.open(name), np.float64).mean())
        if self.tokenizer.spec.vocab_size is not None:
            used = codebook_use(self.arrays.open("ids"), self.tokenizer.spec.vocab_size)
            found |= dict(zip(("codebook_usage", "codebook_perplexity"), used, strict=True))
        return found
