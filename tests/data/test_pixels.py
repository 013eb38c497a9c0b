from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vision_ar.data.pixels import crop_some, to_square

pytestmark = pytest.mark.filterwarnings("ignore")


def test_random_crops_show_the_chosen_part() -> None:
    ramp = torch.linspace(0, 1, 40).expand(3, 1, 40, 40)  # brightness is the place from left to right
    draws = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.5, 0.5]])  # size, left, top
    crops = crop_some(ramp, draws, 32)
    assert crops.shape == (3, 1, 32, 32)
    left, right = crops[:, 0, 0, 0], crops[:, 0, 0, -1]
    torch.testing.assert_close(left, torch.tensor([0.0, 0.2, 0.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(right, torch.tensor([0.8, 1.0, 1.0]), atol=0.02, rtol=0)


def values(mode: str) -> tuple[Image.Image, int]:
    """A picture whose left half is dark and whose right half is bright, and the brightness of the right half."""
    step = np.repeat([[0, 200]], 4, axis=0).repeat(2, axis=1).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(step.astype(np.uint16) * 257), 200
    if mode == "RGBA":
        return Image.fromarray(np.stack([step, step, step, np.full_like(step, 255)], -1)), 200
    if mode == "1":
        return Image.fromarray(step).convert("1", dither=Image.Dither.NONE), 255
    return Image.fromarray(step).convert(mode), 200


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "I;16", "I", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_integer_mode_is_converted(mode: str, channels: int) -> None:
    picture, bright = values(mode)
    if mode == "I":
        picture = Image.fromarray(np.asarray(picture).astype(np.int32) * 257)
    pixels = to_square(picture, 4, channels)
    assert pixels.shape == (channels, 4, 4) and pixels.dtype == torch.uint8
    wanted = torch.tensor([0, 0, bright, bright]).expand(channels, 4, 4)
    torch.testing.assert_close(pixels.long(), wanted, atol=1, rtol=0)


def test_transparent_pixels_become_white() -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 3] = 255
    assert to_square(Image.fromarray(pixels), 4, 3)[0, :, 0].tolist() == [0, 0, 255, 255]


def test_float_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="pixels must be integers, got floats"):
        to_square(Image.fromarray(np.zeros((4, 4), np.float32)), 4, 3)


def test_central_square_is_taken() -> None:
    wide = np.zeros((4, 8), np.uint8)
    wide[:, 2:6] = 100
    assert to_square(Image.fromarray(wide), 4, 1).unique().tolist() == [100]
