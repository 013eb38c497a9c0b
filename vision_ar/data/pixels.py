"""Pixels: any picture to a uint8 square, and squares to the float images that a model reads."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from vision_ar.data.sampler import key_seed

MIN_CROP = 0.8
"""Side of the smallest random crop, as a share of the short side of the picture."""


def to_square(image: Image.Image, side: int, channels: int) -> Tensor:
    """Resize the central square of a picture, (C, side, side), uint8; pixels stay exact when the size fits already.

    Args:
        image: of any mode but floats; transparent parts become white, 16-bit values are scaled, Exif turns are done.
        side: height and width of the result.
        channels: 3 for RGB, 1 for grey.
    """
    image = _eight_bits(ImageOps.exif_transpose(image)).convert("RGB" if channels == 3 else "L")
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    box = (left, top, left + short, top + short)
    pixels = torch.from_numpy(np.array(image.resize((side, side), Image.Resampling.BICUBIC, box)))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("pixels must be integers, got floats, which have no known range")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((values // 257).astype(np.uint8))  # 65535 / 257 = 255
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image


def normalise(pixels: Tensor) -> Tensor:
    """Turn uint8 pixels into float32 images in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


@lru_cache(maxsize=2)
def uniform_draws(seed: int, epoch: int, count: int) -> Tensor:
    """Four uniform numbers for every sample of an epoch, (count, 4), in [0, 1); not to be written to."""
    generator = torch.Generator().manual_seed(key_seed("views", seed, epoch))
    return torch.rand(count, 4, generator=generator)


def flip_some(pixels: Tensor, draws: Tensor) -> Tensor:
    """Mirror the pictures, (B, C, H, W), whose draw, (B,), is below one half."""
    return torch.where((draws < 0.5)[:, None, None, None], pixels.flip(-1), pixels)


def crop_some(images: Tensor, draws: Tensor, image_size: int) -> Tensor:
    """Cut a random square out of every image and resize it bilinearly, (B, C, image_size, image_size).

    Args:
        images: squares, (B, C, H, H), float; sharp results need H of at least image_size / MIN_CROP.
        draws: size, left and top of each square, (B, 3), in [0, 1); the size is uniform in [MIN_CROP, 1] of H.
        image_size: of the result.
    """
    scale = MIN_CROP + (1 - MIN_CROP) * draws[:, 0]
    centre = (2 * draws[:, 1:] - 1) * (1 - scale)[:, None]  # in units of half the side, as affine_grid wants it
    theta = torch.cat([torch.diag_embed(scale[:, None].expand(-1, 2)), centre[:, :, None]], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(theta, [*images.shape[:2], image_size, image_size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
