"""Finished images that are to be scored, from a folder or an array file, and samples written as one such file.

A picture that is silently resized, flattened or cut to eight bits falsifies a score, so that here it is an error.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from vision_ar.data.sources import SUFFIXES, BadImageError
from vision_ar.shapes import check_shape

LISTING = "samples.json"  # what sample.py writes beside its images, its grid and its previews
MEMBER = "arr_0.npy"
CHUNK_BYTES = 1 << 22
COLOURS = {1: "grey", 3: "RGB"}
GREY_MODES, COLOUR_MODES = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA")
LOSSY_FORMATS = ("JPEG", "WEBP")


class PixelSet(ABC):
    """Images to be scored: uint8 pixels of one size, in a fixed order. Subclasses set the attributes."""

    name: str
    """Path as it was given, for messages and reports."""
    count: int
    channels: int
    """3 for RGB, 1 for grey."""
    height: int
    width: int
    lossy: bool
    """True when a file is a JPEG or a WebP, whatever its suffix says: their artefacts count in a score."""

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Read images start to stop - 1 as uint8 batches, (B, C, H, W), in order, one batch in memory.

        Args:
            batch_size: images at a time; the last batch may be smaller.
            start: first image.
            stop: image to stop before; None reads to the end.

        Raises:
            ValueError: at once if the numbers do not fit, and while reading if a file is broken or an image is not
                opaque. The checksum of an .npz is that of all images: it is checked when they are read to the end.
        """
        stop = self.count if stop is None else stop
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= start <= stop <= self.count:
            wanted = f"in order and between 0 and {self.count}, the number of images in {self.name}"
            raise ValueError(f"start and stop must be {wanted}, got {start} and {stop}")
        return self._batches(batch_size, start, stop)

    @abstractmethod
    def _batches(self, batch_size: int, start: int, stop: int) -> Iterator[Tensor]:
        """As `batches`, with numbers that fit."""

    @abstractmethod
    def identity(self) -> str:
        """What changes when the images do, found without reading them all: to know features of older ones by."""

    def digest(self) -> str:
        """Fingerprint of all pixels in order, whatever kind of file holds them; errors as `batches`."""
        size = max(1, CHUNK_BYTES // (self.channels * self.height * self.width))
        hashes = np.concatenate([image_hashes(pixels) for pixels in self.batches(size)])
        return digest_of(hashes, self.channels, self.height, self.width)


def image_hashes(pixels: Tensor) -> np.ndarray:
    """The sha256 of each image of a batch (B, C, H, W), uint8, as (B, 32), uint8."""
    digests = [hashlib.sha256(image.contiguous().numpy().data).digest() for image in pixels]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(pixels), -1)


def digest_of(hashes: np.ndarray, channels: int, height: int, width: int) -> str:
    """Fingerprint of a set from the hashes of its images, (N, 32): batches may be hashed in any order and place."""
    sha = hashlib.sha256(f"{len(hashes)} {channels} {height} {width}".encode())
    sha.update(np.ascontiguousarray(hashes).data)
    return sha.hexdigest()[:16]


def identity_of(files: Iterable[Path]) -> str:
    """First 16 hex digits of the sha256 of names, sizes and times of files."""
    sha = hashlib.sha256()
    for file in files:
        status = file.stat()
        sha.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return sha.hexdigest()[:16]


def open_images(path: str | Path, channels: Literal[1, 3] | None = None) -> PixelSet:
    """Open images for scoring, after a look at every header, so that a misfit is found before any work is done.

    Args:
        path: folder of pictures, see `ImageFiles`, or .npz or .npy file, see `NpzImages`.
        channels: 3 if they must be RGB, 1 if they must be grey, None if either will do.

    Raises:
        FileNotFoundError: if there is no such path, or a listed picture is missing.
        ValueError: with the name of the file, if the images cannot be scored as they are.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"images must exist, {path} does not; make them with: python sample.py --out {path}")
    if not path.is_dir() and path.suffix.lower() not in (".npz", ".npy"):
        raise ValueError(f"images must be a folder, an .npz or an .npy file, got {path}")
    images: PixelSet = ImageFiles(path) if path.is_dir() else NpzImages(path)
    if channels is not None and images.channels != channels:
        raise ValueError(f"{path} must hold {COLOURS[channels]} images, got {COLOURS[images.channels]} ones")
    return images


class ImageFiles(PixelSet):
    """Pictures below a folder, sorted by path; a folder that `sample.py` wrote gives what its samples.json lists.

    Hidden files, and suffixes that training does not read either, are left out. Palettes, and alpha channels that
    are opaque, are resolved, which loses nothing.

    Args:
        folder: is searched with all folders in it.

    Raises:
        FileNotFoundError: if a listed picture is missing.
        ValueError: if there is no picture, one is not 8-bit grey or RGB, still and upright, or they are not alike.
    """

    def __init__(self, folder: Path) -> None:
        self.name, self.files = str(folder), _find_files(folder, set())
        self.count, self.lossy = len(self.files), False
        if not self.files:
            raise ValueError(f"{folder} must hold images ({' '.join(sorted(SUFFIXES))}), got none")
        for number, path in enumerate(self.files):
            with _naming(path), Image.open(path) as image:
                layout = _layout(image)
                self.lossy |= image.format in LOSSY_FORMATS
            if number == 0:
                self.channels, self.height, self.width = layout
            self._check_alike(path, layout)

    def identity(self) -> str:
        """Of names, sizes and times of the files."""
        return identity_of(self.files)

    def _check_alike(self, path: Path, layout: tuple[int, int, int]) -> None:
        channels, height, width = layout
        if channels != self.channels:
            wanted = f"{COLOURS[self.channels]} as {self.files[0]}"
            raise ValueError(f"{path} must be {wanted}, got {COLOURS[channels]}; convert the one or the other")
        if (height, width) != (self.height, self.width):
            wanted = f"{self.width} x {self.height} pixels as {self.files[0]}"
            raise ValueError(f"{path} must have {wanted}, got {width} x {height}")

    def _batches(self, batch_size: int, start: int, stop: int) -> Iterator[Tensor]:
        for first in range(start, stop, batch_size):
            paths = self.files[first : min(first + batch_size, stop)]
            yield torch.from_numpy(np.stack([self._decode(path) for path in paths]))

    def _decode(self, path: Path) -> np.ndarray:
        """Pixels of a file, (C, H, W); all is checked once more, as the file may have been replaced."""
        with _naming(path):
            data = path.read_bytes()
            Image.open(io.BytesIO(data)).verify()  # the checksums of a PNG, which decoding leaves out
            image = Image.open(io.BytesIO(data))
            layout = _layout(image)
            image.load()
            _check_upright(image)  # a PNG may say it behind its pixels
            pixels = np.asarray(_opaque(image).convert("L" if layout[0] == 1 else "RGB"))
        self._check_alike(path, layout)
        return pixels[None] if layout[0] == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _find_files(folder: Path, seen: set[Path]) -> list[Path]:
    """Image files below a folder, by path; `seen` are the folders so far."""
    if folder.resolve() in seen:
        raise ValueError(f"{folder} must not be a link to a folder that is read already; its images would count twice")
    seen.add(folder.resolve())
    if (folder / LISTING).is_file():
        return _listed_files(folder / LISTING)
    files = []
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if path.is_dir():
            files += _find_files(path, seen)
        elif path.suffix.lower() in SUFFIXES:
            files.append(path)
    return files


def _listed_files(listing: Path) -> list[Path]:
    """Image files in the order of a samples.json."""
    try:
        names = [str(entry["file"]) for entry in json.loads(listing.read_text(encoding="utf-8"))["images"]]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise ValueError(f"{listing} must list images as sample.py does, got {reason}; sample again") from error
    files: dict[str, Path] = {}
    for name in names:
        if Path(name).name != name or name in files:
            raise ValueError(f"{listing} must list files beside it, each once, got {name!r}; sample again")
        files[name] = listing.parent / name
        if not files[name].is_file():
            raise FileNotFoundError(f"{files[name]} is missing, though {listing} lists it; sample again")
    return list(files.values())


@contextmanager
def _naming(where: str | Path) -> Iterator[None]:
    """Say in every error, in one line, where it happened."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise BadImageError(str(where), "not an image that Pillow can read") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and others
        raise BadImageError(str(where), " ".join(str(error).split()) or type(error).__name__) from error


def _layout(image: ImageFile.ImageFile) -> tuple[int, int, int]:
    """Channels, height and width by the header, which is checked; nothing is decoded."""
    if getattr(image, "is_animated", False):  # formats without animation lack the attribute
        raise ValueError("the picture must have 1 frame, got several; save each as a file")
    if _is_deep(image):
        raise ValueError(f"pixels must have 8 bits a channel, got more in mode {image.mode}; convert the files first")
    if image.mode not in GREY_MODES + COLOUR_MODES:
        raise ValueError(f"pixels must be grey or RGB, got mode {image.mode}; convert the files first")
    if image.format != "PNG" or "exif" in image.info:  # asking a PNG without Exif would decode it
        _check_upright(image)
    return 1 if image.mode in GREY_MODES else 3, image.height, image.width


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """True for more than 8 bits, also where Pillow would cut them to 8 and only its name of the stored form tells."""
    stored = image.tile[0][3] if image.tile else ""
    if image.format == "PPM" and isinstance(stored, tuple) and stored[1] > 255:
        return True
    return image.mode[0] in "IF" or re.search(r"(LA|RGB.?);16", str(stored)) is not None


def _check_upright(image: Image.Image) -> None:
    turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    if turn != 1:
        raise ValueError(f"the Exif orientation must be 1, got {turn}; turn the pixels and remove the tag")


def _opaque(image: Image.Image) -> Image.Image:
    """Drop an alpha channel, or a colour that stands for transparency, that nothing shows through."""
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    lowest = np.asarray(layer)[..., 3].min()
    if lowest < 255:
        raise ValueError(f"the picture must be opaque, got alpha {lowest}; lay it on a background first")
    return layer.convert("RGB") if image.mode in COLOUR_MODES else layer.getchannel("R")


class NpzImages(PixelSet):
    """Pixels in `arr_0` of an .npz, as published scorers read them, or in an .npy: (N, H, W, C), uint8, C 3 or 1.

    Other arrays of an .npz, such as labels, are left out. The file is read as a stream and never unpickled.

    Args:
        path: of the file; its suffix tells the kind.

    Raises:
        ValueError: if the file is broken, or its array has another name, shape or dtype, or holds no image.

    Source:
        Sample files of Dhariwal & Nichol 2021 (ADM).
    """

    def __init__(self, path: Path) -> None:
        self.name, self.path, self.lossy = str(path), path, False
        with _naming(path), _open_array(path) as (file, num_bytes):
            shape, in_columns, dtype = self._header = _read_header(file)
            if in_columns:
                raise ValueError("pixels must be in C order, got Fortran order; save np.ascontiguousarray of them")
            if dtype != np.uint8:
                raise ValueError(f"pixels must be uint8, got {dtype.name}{_nan_note(file, shape, dtype)}")
            if len(shape) != 4 or shape[3] not in COLOURS:
                raise ValueError(f"pixels must have shape (N, H, W, C) with C 3 or 1, got {shape}")
            if min(shape) < 1:
                raise ValueError(f"pixels must be at least 1 image of 1 pixel, got shape {shape}")
            if num_bytes != file.tell() + prod(shape):
                raise ValueError(f"the array must have {file.tell() + prod(shape)} bytes, got {num_bytes}")
        self.count, self.height, self.width, self.channels = shape

    def identity(self) -> str:
        """Of name, size and time of the file."""
        return identity_of([self.path])

    def _batches(self, batch_size: int, start: int, stop: int) -> Iterator[Tensor]:
        shape = (self.height, self.width, self.channels)
        with _open_array(self.path) as (file, _):
            with _naming(self.path):
                if _read_header(file) != self._header:
                    raise ValueError("the array must stay as it is while it is read, got another one")
                _skip(file, start * prod(shape))
            for first in range(start, stop, batch_size):
                size = min(batch_size, stop - first)
                with _naming(f"{self.path}, images {first} to {first + size - 1}"):
                    data = file.read(size * prod(shape))
                    if len(data) < size * prod(shape):
                        raise ValueError("the file must be whole, got its end too early")
                values = np.frombuffer(data, np.uint8).reshape(size, *shape)
                yield torch.from_numpy(np.array(values.transpose(0, 3, 1, 2), order="C"))


@contextmanager
def _open_array(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """The .npy file, or the one of this layout inside the .npz, with its length in bytes."""
    if path.suffix.lower() == ".npy":
        with path.open("rb") as plain:
            yield plain, path.stat().st_size
        return
    with zipfile.ZipFile(path) as archive:
        if MEMBER not in archive.namelist():
            found = ", ".join(name.removesuffix(".npy") for name in archive.namelist()) or "nothing"
            raise ValueError(f"the archive must hold arr_0, got {found}")
        with archive.open(MEMBER) as member:
            yield member, archive.getinfo(MEMBER).file_size


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, True for Fortran order, and dtype; the file is left where the values begin."""
    if (version := npy.read_magic(file)) != (1, 0):  # later ones only name fields of records
        raise ValueError(f"the .npy version must be 1.0, got {version[0]}.{version[1]}")
    return npy.read_array_header_1_0(file)


def _skip(file: IO[bytes], num_bytes: int) -> None:
    """Go forward; in an archive by reading, as seeking takes more memory and may turn the checksum off."""
    if not isinstance(file, zipfile.ZipExtFile):
        file.seek(num_bytes, os.SEEK_CUR)
        return
    for first in range(0, num_bytes, CHUNK_BYTES):
        file.read(min(CHUNK_BYTES, num_bytes - first))


def _nan_note(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> str:
    """For a message on floats: which image is the first with a NaN."""
    seen, per_image = 0, max(1, prod(shape[1:]))
    while dtype.kind == "f" and (data := file.read(CHUNK_BYTES // dtype.itemsize * dtype.itemsize)):
        values = np.frombuffer(data, dtype, len(data) // dtype.itemsize)
        if (bad := np.isnan(values)).any():
            return f" with NaN, first in image {(seen + int(bad.argmax())) // per_image}"
        seen += len(values)
    return ""


def write_npz(path: str | Path, batches: Iterable[Tensor], count: int) -> None:
    """Write samples as `arr_0`, (N, H, W, C), of an .npz, batch by batch; the file appears when it is whole.

    Args:
        path: ends in .npz; its folder is made, an older file replaced.
        batches: pixels, (B, C, H, W), uint8, C 3 or 1; grey ones keep one channel, which some scorers refuse.
        count: number of images in all batches, at least 1.

    Raises:
        TypeError: if a batch is not uint8.
        ValueError: if the batches differ in shape, or hold another number of images.

    Source:
        As `NpzImages`; not compressed, as numpy.savez does it.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz":
        raise ValueError(f"path must end in .npz, got {path}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with zipfile.ZipFile(partial, "w") as archive:
            with archive.open(zipfile.ZipInfo(MEMBER), "w", force_zip64=True) as file:  # without the time of day
                _write_array(file, batches, count)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_array(file: IO[bytes], batches: Iterable[Tensor], count: int) -> None:
    written, sizes = 0, dict[str, int]()
    for pixels in batches:
        check_shape("batches", pixels, "B C H W", **sizes)
        if pixels.dtype != torch.uint8:
            raise TypeError(f"batches must be uint8, got {pixels.dtype}")
        if not sizes:
            sizes = dict(zip("CHW", pixels.shape[1:], strict=True))
            if sizes["C"] not in COLOURS:
                raise ValueError(f"batches must have 3 or 1 channels, got {sizes['C']}")
            shape = (count, sizes["H"], sizes["W"], sizes["C"])
            npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        written += len(pixels)
        if written > count:
            break
        file.write(pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy().data)
    if written != count:
        raise ValueError(f"batches must hold {count} images, got {written}{' or more' if written > count else ''}")
