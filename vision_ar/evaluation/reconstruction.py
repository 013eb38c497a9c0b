"""How close reconstructed images are to the originals."""

from __future__ import annotations

from torch import Tensor

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
    check_shape("images", images, "B C H W")
    if reference.shape != images.shape:
        raise ValueError(
            f"reference must have shape {tuple(images.shape)}, as images have, got {tuple(reference.shape)}"
        )
    for name, value in (("images", images), ("reference", reference)):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be float in [-1, 1], got {value.dtype}; use vision_ar.data.pixels.normalise")
    error = images.float().clamp(-1, 1) - reference.float().clamp(-1, 1)
    return 10 * (DATA_RANGE**2 / error.square().mean(dim=(1, 2, 3))).log10()
