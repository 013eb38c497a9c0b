"""Pictures where people look: pixels, grids, strips and animations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vision_ar.data.pixels import normalise
from vision_ar.data.sources import BadImageError, FolderSource

GRID_GAP = 2
MIN_SHOWN_SIDE = 64  # smaller pictures are enlarged in grids, by whole factors, so that one can see them


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8 pixels, rounded to nearest."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """One image (C, H, W) in [-1, 1] as a picture."""
    array = to_pixels(image).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def read_image(path: str | Path, size: int, channels: int = 3) -> Tensor:
    """Read a picture as training does: its middle square, resized, (1, C, size, size) in [-1, 1].

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no picture.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"image must be a file, got {path}")
    try:
        pixels, _ = FolderSource([(Path(path), 0)], [""]).square(0, size, channels)
    except BadImageError as error:
        raise ValueError(f"image must be a whole picture, {path} is not: {error.reason}") from error
    return normalise(pixels)[None]


def grid(images: Tensor, columns: int) -> Tensor:
    """Lay images (B, C, H, W) out in rows of `columns`, with white gaps: (C, H', W')."""
    factor = max(1, -(-MIN_SHOWN_SIDE // images.shape[-1]))
    images = images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    rows = -(-len(images) // columns)
    images = F.pad(images, (0, GRID_GAP, 0, GRID_GAP), value=1.0)
    blank = images.new_ones(rows * columns - len(images), *images.shape[1:])
    cells = torch.cat([images, blank]).unflatten(0, (rows, columns))  # (R, columns, C, H, W)
    sheet = cells.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return F.pad(sheet, (GRID_GAP, 0, GRID_GAP, 0), value=1.0)


def columns_for(count: int) -> int:
    """Columns of a grid that is about square, preferring full rows."""
    return next(c for c in range(max(1, round(count**0.5)), count + 1) if count % c == 0 or c * c >= count)


def save_gif(frames: Sequence[Tensor], path: str | Path, frame_ms: int = 300, last_ms: int = 1500) -> None:
    """Save images (C, H, W) as a looping animation that rests on the last one."""
    pictures = [to_pil(frame).convert("RGB") for frame in frames]
    durations = [frame_ms] * (len(pictures) - 1) + [last_ms]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def save_previews(previews: Tensor, folder: Path) -> None:
    """Write `previews.png` (rows are samples, columns are groups) and the animated `previews.gif`.

    Args:
        previews: (B, groups, C, H, W) in [-1, 1].
        folder: exists.
    """
    to_pil(grid(previews.flatten(0, 1), previews.shape[1])).save(folder / "previews.png")
    columns = columns_for(len(previews))
    save_gif([grid(frame, columns) for frame in previews.unbind(1)], folder / "previews.gif")
