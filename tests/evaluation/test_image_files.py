"""Images to be scored: the same pixels from every kind of file, and an error for all that would change a score."""

from __future__ import annotations

import json
import os
import re
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch import Tensor

from vision_ar.evaluation import image_files
from vision_ar.evaluation.image_files import ImageFiles, NpzImages, PixelSet, open_images, write_npz

SIZE = (6, 5)  # height, width
Save = Callable[[Path], None]


def noise(count: int, channels: int = 3, size: tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, *size), dtype=torch.uint8, generator=generator)


def picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())


def write_pngs(folder: Path, pixels: Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(pixels):
        picture(image).save(folder / f"{number:05d}.png")
    return folder


def whole(images: PixelSet) -> Tensor:
    return torch.cat(list(images.batches(4)))


def last_added(values: Tensor, alpha: int) -> Tensor:
    """The image with one more channel."""
    return torch.cat([values, torch.full_like(values[:1], alpha)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three RGB images; what is added as z.png and so on comes last."""
    return write_pngs(tmp_path / "images", noise(3))


def test_a_folder_gives_its_pixels_in_the_order_of_the_paths(tmp_path: Path) -> None:
    pixels = noise(4)
    for place, image in zip(("b/2.PNG", "a/x/1.bmp", "c.png", "a/0.png"), pixels, strict=True):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        picture(image).save(tmp_path / place)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / "0.png").write_text("no image")
    images = open_images(tmp_path)
    assert isinstance(images, ImageFiles)
    assert (images.name, images.count, images.channels) == (str(tmp_path), 4, 3)
    assert ((images.height, images.width), images.lossy) == (SIZE, False)
    assert torch.equal(whole(images), pixels[[3, 1, 0, 2]])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_written_archive_gives_the_same_pixels_and_digest_as_pngs_and_as_npy(tmp_path: Path, channels: int) -> None:
    pixels = noise(7, channels)
    archive, array = tmp_path / "new" / "samples.npz", tmp_path / "samples.npy"
    write_npz(archive, pixels.split(3), 7)
    np.save(array, pixels.permute(0, 2, 3, 1).numpy())
    sets = [open_images(write_pngs(tmp_path / "pngs", pixels)), open_images(archive), open_images(str(array))]
    for images in sets:
        assert (images.count, images.channels, images.height, images.width) == (7, channels, *SIZE)
        assert torch.equal(whole(images), pixels) and not images.lossy
        assert all(batch.dtype == torch.uint8 and batch.is_contiguous() for batch in images.batches(3))
    assert len({images.digest() for images in sets}) == 1
    assert re.fullmatch("[0-9a-f]{16}", sets[0].digest())
    with np.load(archive) as loaded:
        assert np.array_equal(loaded["arr_0"], pixels.permute(0, 2, 3, 1).numpy())
    assert os.listdir(archive.parent) == ["samples.npz"]


def test_the_digest_tells_order_shape_and_single_values_apart_but_not_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, digests = noise(4), []
    changed = pixels.clone()
    changed[3, 2, 5, 4] ^= 1
    for number, values in enumerate((pixels, pixels.flip(0), pixels.mT, changed, pixels[:3])):
        write_npz(tmp_path / f"{number}.npz", [values], len(values))
        digests.append(open_images(tmp_path / f"{number}.npz").digest())
    assert len(set(digests)) == 5
    monkeypatch.setattr(image_files, "CHUNK_BYTES", 1)
    assert open_images(tmp_path / "0.npz").digest() == digests[0]


@pytest.mark.parametrize("kind", ["folder", "stored", "compressed", "npy"])
@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_every_slice_is_that_of_the_whole(tmp_path: Path, kind: str, batch_size: int) -> None:
    pixels = noise(7)
    values, path = pixels.permute(0, 2, 3, 1).numpy(), tmp_path / ("x.npy" if kind == "npy" else "x.npz")
    if kind == "folder":
        path = write_pngs(tmp_path / "pngs", pixels)
    else:
        {"stored": np.savez, "compressed": np.savez_compressed, "npy": np.save}[kind](path, values)
    images = open_images(path)
    for start, stop in [(0, None), (0, 7), (2, None), (3, 5), (6, 7)]:
        batches = list(images.batches(batch_size, start, stop))
        assert torch.equal(torch.cat(batches), pixels[start:stop])
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert 1 <= len(batches[-1]) <= batch_size
    assert list(images.batches(batch_size, 4, 4)) == []


def test_numbers_that_do_not_fit_are_refused_at_once(folder: Path) -> None:
    images = open_images(folder)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        images.batches(0)
    for start, stop in [(-1, 2), (2, 1), (0, 4), (4, None)]:
        with pytest.raises(ValueError, match=r"start and stop must be in order and between 0 and 3, .* got -?\d and"):
            images.batches(2, start, stop)


def test_opening_a_folder_decodes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    assert open_images(folder).count == 3


def test_the_listing_of_a_sample_folder_says_what_is_an_image(folder: Path) -> None:
    pixels = whole(open_images(folder))
    picture(noise(1, size=(40, 40))[0]).save(folder / "grid.png")
    picture(noise(1, size=(40, 90))[0]).save(folder / "previews.png")
    (folder / "previews.gif").write_bytes(b"")
    listing = {"images": [{"file": f"{number:05d}.png", "label": 0, "seed": 0} for number in (2, 0)]}
    (folder / "samples.json").write_text(json.dumps(listing))
    assert torch.equal(whole(open_images(folder)), pixels[[2, 0]])
    write_pngs(folder.parent / "other", noise(1, seed=1))
    assert torch.equal(whole(open_images(folder.parent)), torch.cat([pixels[[2, 0]], noise(1, seed=1)]))


def test_a_grid_without_a_listing_is_an_odd_image(folder: Path) -> None:
    picture(noise(1, size=(40, 41))[0]).save(folder / "grid.png")
    with pytest.raises(ValueError, match=r"grid\.png must have 5 x 6 pixels as .*00000\.png, got 41 x 40"):
        open_images(folder)


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        ("no json", "samples.json must list images as sample.py does, got JSONDecodeError"),
        ("[]", "samples.json must list images as sample.py does, got TypeError"),
        ("{}", "samples.json must list images as sample.py does, got KeyError 'images'"),
        ('{"images": ["00000.png"]}', "samples.json must list images as sample.py does, got TypeError"),
        ('{"images": [{"file": "../x.png"}]}', r"samples.json must list files beside it, each once, got '../x.png'"),
        ('{"images": [{"file": "00000.png"}, {"file": "00000.png"}]}', "each once, got '00000.png'"),
        ('{"images": []}', "images must hold images .*, got none"),
    ],
)
def test_a_listing_that_cannot_be_followed_is_refused(folder: Path, listing: str, message: str) -> None:
    (folder / "samples.json").write_text(listing)
    with pytest.raises(ValueError, match=message):
        open_images(folder)


def test_a_listed_image_that_is_missing_is_named(folder: Path) -> None:
    (folder / "samples.json").write_text('{"images": [{"file": "00000.png"}, {"file": "00009.png"}]}')
    with pytest.raises(FileNotFoundError, match=r"00009\.png is missing, though .*samples\.json lists it"):
        open_images(folder)


def test_paths_that_hold_no_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="images must exist, .*nowhere does not; make them with: python sample"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty must hold images \(\.bmp .*\.webp\), got none"):
        open_images(tmp_path / "empty")
    (tmp_path / "empty" / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="empty must hold images .*, got none"):
        open_images(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"images must be a folder, an \.npz or an \.npy file, got .*a\.txt"):
        open_images(tmp_path / "empty" / "a.txt")


def test_a_folder_that_is_linked_into_itself_is_refused(folder: Path) -> None:
    (folder / "again").symlink_to(folder, target_is_directory=True)
    with pytest.raises(ValueError, match="again must not be a link to a folder that is read already"):
        open_images(folder)


def test_the_wanted_number_of_channels_is_required(tmp_path: Path) -> None:
    grey, colour = write_pngs(tmp_path / "grey", noise(1, 1)), write_pngs(tmp_path / "colour", noise(1))
    assert open_images(grey, channels=1).channels == 1 and open_images(colour, channels=3).channels == 3
    with pytest.raises(ValueError, match="grey must hold RGB images, got grey ones"):
        open_images(grey, channels=3)
    with pytest.raises(ValueError, match="colour must hold grey images, got RGB ones"):
        open_images(colour, channels=1)


def test_grey_among_colour_and_colour_among_grey_are_refused(tmp_path: Path) -> None:
    for mode in ("L", "1"):
        folder = write_pngs(tmp_path / mode, noise(2))
        picture(noise(1, 1)[0]).convert(mode).save(folder / "z.png")
        with pytest.raises(ValueError, match=r"z\.png must be RGB as .*00000\.png, got grey; convert"):
            open_images(folder)
    grey = write_pngs(tmp_path / "grey", noise(2, 1))
    picture(noise(1)[0]).save(grey / "z.png")
    with pytest.raises(ValueError, match=r"z\.png must be grey as .*00000\.png, got RGB; convert"):
        open_images(grey)


def test_black_and_white_images_are_grey_ones_of_two_values(tmp_path: Path) -> None:
    pixels = noise(2, 1) // 128 * 255
    for number, image in enumerate(pixels):
        picture(image).convert("1", dither=Image.Dither.NONE).save(tmp_path / f"{number}.png")
    images = open_images(tmp_path)
    assert images.channels == 1 and torch.equal(whole(images), pixels)


def test_palettes_are_resolved_without_loss(tmp_path: Path) -> None:
    for suffix in ("png", "gif"):
        reduced = picture(noise(1)[0]).quantize(8)
        reduced.save(tmp_path / f"0.{suffix}")
        with Image.open(tmp_path / f"0.{suffix}") as stored:
            assert stored.mode == "P"
        expected = torch.from_numpy(np.array(reduced.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(whole(open_images(tmp_path))[0], expected)
        (tmp_path / f"0.{suffix}").unlink()


def test_opaque_alpha_is_dropped(tmp_path: Path) -> None:
    for channels, folder in ((3, tmp_path / "colour"), (1, tmp_path / "grey")):
        pixels = noise(2, channels)
        write_pngs(folder, pixels[:1])
        picture(last_added(pixels[1], 255)).save(folder / "z.png")
        images = open_images(folder)
        assert images.channels == channels and torch.equal(whole(images), pixels)


def test_a_transparent_colour_that_no_pixel_has_is_dropped(tmp_path: Path) -> None:
    pixels = noise(1) // 2
    picture(pixels[0]).save(tmp_path / "0.png", transparency=(255, 255, 255))
    assert torch.equal(whole(open_images(tmp_path)), pixels)


def save_palette_with_transparency(path: Path) -> None:
    picture(noise(1)[0]).quantize(8).save(path, transparency=0)


def save_grey_with_transparency(path: Path) -> None:
    picture(torch.full((1, *SIZE), 7, dtype=torch.uint8)).save(path, transparency=7)


@pytest.mark.parametrize(
    ("save", "lowest"),
    [
        (lambda path: picture(last_added(noise(1)[0], 254)).save(path), 254),
        (lambda path: picture(last_added(noise(1, 1)[0], 3)).save(path), 3),
        (save_palette_with_transparency, 0),
        (save_grey_with_transparency, 0),
    ],
)
def test_transparency_is_refused_when_the_image_is_read(tmp_path: Path, save: Save, lowest: int) -> None:
    save(tmp_path / "0.png")
    images = open_images(tmp_path)
    with pytest.raises(ValueError, match=rf"0\.png: the picture must be opaque, got alpha {lowest}; lay it"):
        whole(images)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def save_deep_png(path: Path, colour_type: int, channels: int) -> None:
    """A PNG with 16 bits a channel, which Pillow reads but does not write."""
    height, width = SIZE
    rows = (b"\0" + b"\1\2" * channels * width) * height
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))


def save_floats(path: Path) -> None:
    Image.fromarray(np.zeros(SIZE, np.float32)).save(path, "TIFF")


def save_long_integers(path: Path) -> None:
    Image.fromarray(np.zeros(SIZE, np.int32)).save(path, "TIFF")


def save_deep_ppm(path: Path) -> None:
    path.write_bytes(b"P6 5 6 65535\n" + b"\1\2" * 3 * 30)


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda path: Image.fromarray(np.zeros(SIZE, np.uint16)).save(path), "8 bits a channel, got more in mode I;16"),
        (save_long_integers, "8 bits a channel, got more in mode I;"),
        (save_floats, "8 bits a channel, got more in mode F;"),
        (lambda path: save_deep_png(path, 2, 3), "8 bits a channel, got more in mode RGB;"),
        (lambda path: save_deep_png(path, 4, 2), "8 bits a channel, got more in mode RGBA;"),
        (lambda path: save_deep_png(path, 6, 4), "8 bits a channel, got more in mode RGBA;"),
        (save_deep_ppm, "8 bits a channel, got more in mode RGB;"),
        (lambda path: Image.new("CMYK", SIZE).save(path, "TIFF"), "grey or RGB, got mode CMYK; convert"),
        (lambda path: Image.new("LAB", SIZE).save(path, "TIFF"), "grey or RGB, got mode LAB; convert"),
    ],
)
def test_modes_that_would_lose_something_are_refused_at_opening(folder: Path, save: Save, message: str) -> None:
    save(folder / "z.png")
    with pytest.raises(ValueError, match=rf"z\.png: pixels must .*{message}"):
        open_images(folder)


def test_shallow_files_are_no_deep_ones(tmp_path: Path) -> None:
    (tmp_path / "0.ppm").write_bytes(b"P6 2 1 255\n" + bytes(range(6)))
    (tmp_path / "1.ppm").write_bytes(b"P3 2 1 255\n0 1 2 3 4 5\n")
    assert whole(open_images(tmp_path)).flatten(2).mT.flatten(1).tolist() == [list(range(6))] * 2


@pytest.mark.parametrize("name", ["z.gif", "z.png", "z.webp", "z.tif"])
def test_animations_are_refused(folder: Path, name: str) -> None:
    frames = [picture(image) for image in noise(3, seed=5)]
    frames[0].save(folder / name, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: the picture must have 1 frame, got several"):
        open_images(folder)


def exif_with(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("name", ["z.png", "z.jpg", "z.webp", "z.tif"])
def test_images_that_want_to_be_turned_are_refused(folder: Path, name: str) -> None:
    picture(noise(1)[0]).save(folder / name, exif=exif_with(1))
    assert open_images(folder).count == 4
    picture(noise(1)[0]).save(folder / name, exif=exif_with(6))
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: the Exif orientation must be 1, got 6; turn the pixels"):
        open_images(folder)


def test_a_turn_that_a_png_states_behind_its_pixels_is_found_when_it_is_read(folder: Path) -> None:
    path = folder / "00001.png"
    exif = exif_with(3).tobytes().removeprefix(b"Exif\0\0")
    path.write_bytes(path.read_bytes()[:-12] + png_chunk(b"eXIf", exif) + png_chunk(b"IEND", b""))
    images = open_images(folder)
    with pytest.raises(ValueError, match=r"00001\.png: the Exif orientation must be 1, got 3"):
        whole(images)


@pytest.mark.parametrize("content", [b"", b"this is text"])
def test_files_that_are_no_images_are_refused_at_opening(folder: Path, content: bytes) -> None:
    (folder / "z.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"z\.png: not an image that Pillow can read$"):
        open_images(folder)


@pytest.mark.parametrize("name", ["z.png", "z.jpg"])
def test_a_file_that_is_cut_off_is_refused_when_it_is_read(tmp_path: Path, name: str) -> None:
    write_pngs(tmp_path, noise(3, size=(64, 64)))
    picture(noise(1, size=(64, 64))[0]).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * 2 // 3])
    images = open_images(tmp_path)
    assert len(list(images.batches(2, stop=2))) == 1
    with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(name)}: [^\n]+$"):
        whole(images)


def test_no_changed_byte_of_a_png_goes_unnoticed(tmp_path: Path) -> None:
    path = write_pngs(tmp_path, noise(1)) / "00000.png"
    data = path.read_bytes()
    for place in range(len(data) - 12):  # the empty chunk at the end says nothing about pixels
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"00000\.png: "):
            whole(open_images(tmp_path))


def test_a_file_that_is_replaced_or_removed_after_opening_is_noticed(folder: Path) -> None:
    images = open_images(folder)
    picture(noise(1, size=(5, 6))[0]).save(folder / "00001.png")
    with pytest.raises(ValueError, match=r"00001\.png must have 5 x 6 pixels as .*00000\.png, got 6 x 5"):
        whole(images)
    (folder / "00001.png").unlink()
    with pytest.raises(ValueError, match=r"00001\.png: .*No such file"):
        whole(images)


@pytest.mark.parametrize(("name", "kind"), [("z.jpg", "JPEG"), ("z.webp", "WEBP"), ("z.png", "JPEG")])
def test_lossy_files_are_allowed_and_reported_whatever_their_suffix(folder: Path, name: str, kind: str) -> None:
    assert not open_images(folder).lossy
    picture(noise(1)[0]).save(folder / name, kind)
    images = open_images(folder)
    assert images.lossy and len(whole(images)) == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 6, 5), np.uint8), r"shape \(N, H, W, C\) with C 3 or 1, got \(2, 6, 5\)"),
        (np.zeros((2, 3, 6, 5), np.uint8), r"shape \(N, H, W, C\) with C 3 or 1, got \(2, 3, 6, 5\)"),
        (np.zeros((2, 6, 5, 4), np.uint8), r"shape \(N, H, W, C\) with C 3 or 1, got \(2, 6, 5, 4\)"),
        (np.zeros((0, 6, 5, 3), np.uint8), r"at least 1 image of 1 pixel, got shape \(0, 6, 5, 3\)"),
        (np.zeros((2, 0, 5, 3), np.uint8), r"at least 1 image of 1 pixel, got shape \(2, 0, 5, 3\)"),
        (np.zeros((2, 6, 5, 3), np.int64), "uint8, got int64$"),
        (np.zeros((2, 6, 5, 3), bool), "uint8, got bool$"),
        (np.zeros((2, 6, 5, 3), np.float32), "uint8, got float32$"),
        (np.array([{"a": 1}, None], dtype=object), "uint8, got object$"),
        (np.float64(3), "uint8, got float64$"),
        (np.asfortranarray(np.zeros((2, 6, 5, 3), np.uint8)), "in C order, got Fortran order"),
    ],
)
@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_arrays_of_another_kind_are_refused(tmp_path: Path, values: np.ndarray, message: str, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    (np.save if suffix == "npy" else np.savez)(path, values)
    with pytest.raises(ValueError, match=rf"x\.{suffix}: pixels must (be|have) {message}"):
        open_images(path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.dtype(">f8")])
def test_the_first_image_with_a_nan_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type) -> None:
    monkeypatch.setattr(image_files, "CHUNK_BYTES", 100)
    values = np.zeros((5, 6, 5, 3), dtype)
    values[3, 5, 4, 2] = values[4, 0, 0, 0] = np.nan
    np.savez(tmp_path / "x.npz", values)
    name = np.dtype(dtype).name
    with pytest.raises(ValueError, match=rf"x\.npz: pixels must be uint8, got {name} with NaN, first in image 3$"):
        open_images(tmp_path / "x.npz")


def test_an_archive_without_arr_0_is_refused_and_labels_are_left_out(tmp_path: Path) -> None:
    pixels = noise(2).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "labels.npz", pixels, np.arange(2))
    assert open_images(tmp_path / "labels.npz").count == 2
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"statistics\.npz: the archive must hold arr_0, got mu, sigma$"):
        open_images(tmp_path / "statistics.npz")
    np.savez(tmp_path / "nothing.npz")
    with pytest.raises(ValueError, match=r"nothing\.npz: the archive must hold arr_0, got nothing$"):
        open_images(tmp_path / "nothing.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_that_is_cut_off_or_changed_is_refused(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "x.npz"
    save(path, noise(400).permute(0, 2, 3, 1).numpy())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"x\.npz: File is not a zip file$"):
        open_images(path)
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])
    for reads in (whole, lambda images: images.digest()):
        with pytest.raises(ValueError, match=r"x\.npz, images \d+ to \d+: (Bad CRC-32|Error -3)"):
            reads(open_images(path))


def test_an_npy_file_that_is_cut_off_too_long_or_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, noise(3).permute(0, 2, 3, 1).numpy())
    data, images = path.read_bytes(), open_images(path)
    for wrong in (data[:-1], data + b"\0"):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=rf"x\.npy: the array must have {len(data)} bytes, got {len(wrong)}"):
            open_images(path)
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"x\.npy, images 2 to 2: the file must be whole, got its end too early"):
        list(images.batches(2))
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"x\.npy: "):
        open_images(path)
    with path.open("wb") as file:
        np.lib.format.write_array(file, np.zeros((1, 2, 2, 3), np.uint8), version=(3, 0))
    with pytest.raises(ValueError, match=r"x\.npy: the \.npy version must be 1\.0, got 3\.0"):
        open_images(path)


def test_an_array_that_is_replaced_after_opening_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    write_npz(path, [noise(3)], 3)
    images = open_images(path)
    write_npz(path, [noise(4)], 4)
    with pytest.raises(ValueError, match=r"x\.npz: the array must stay as it is while it is read, got another one"):
        whole(images)


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("save", [np.savez_compressed, np.savez, np.save])
def test_a_large_array_is_read_in_pieces(tmp_path: Path, save: Callable[..., None]) -> None:
    path, shape = tmp_path / ("x.npy" if save is np.save else "x.npz"), (208, 256, 256, 3)
    save(path, np.zeros(shape, np.uint8))  # 40 MB

    def read() -> None:
        images = open_images(path)
        assert isinstance(images, NpzImages)
        assert sum(len(batch) for batch in images.batches(8)) == shape[0]
        assert sum(len(batch) for batch in images.batches(8, start=200)) == 8
        images.digest()

    assert peak_bytes(read) < 25_000_000


def test_a_large_array_is_written_in_pieces(tmp_path: Path) -> None:
    def batches() -> Iterator[Tensor]:
        for _ in range(26):
            yield torch.from_numpy(np.zeros((8, 3, 256, 256), np.uint8))

    assert peak_bytes(lambda: write_npz(tmp_path / "x.npz", batches(), 208)) < 10_000_000
    assert open_images(tmp_path / "x.npz").count == 208


def test_equal_samples_make_equal_archives_and_replace_older_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    write_npz(path, [noise(3)], 3)
    first = path.read_bytes()
    write_npz(path, noise(3).split(1), 3)
    assert path.read_bytes() == first
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["arr_0.npy"] and archive.testzip() is None


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([noise(2)], ValueError, "batches must hold 3 images, got 2$"),
        ([noise(2), noise(2)], ValueError, "batches must hold 3 images, got 4 or more"),
        ([], ValueError, "batches must hold 3 images, got 0$"),
        ([noise(2).float()], TypeError, "batches must be uint8, got torch.float32"),
        ([noise(3, 4)], ValueError, "batches must have 3 or 1 channels, got 4"),
        ([noise(3)[0]], ValueError, r"batches must have shape \(B, C, H, W\), got \(3, 6, 5\)"),
        ([noise(1), noise(2, 1)], ValueError, r"batches must have shape \(B, C=3, H=6, W=5\), got \(2, 1, 6, 5\)"),
    ],
)
def test_batches_that_do_not_fit_leave_the_older_archive_as_it_is(
    tmp_path: Path, batches: list[Tensor], error: type[Exception], message: str
) -> None:
    path = tmp_path / "x.npz"
    write_npz(path, [noise(1, seed=7)], 1)
    with pytest.raises(error, match=message):
        write_npz(path, batches, 3)
    assert os.listdir(tmp_path) == ["x.npz"]
    assert torch.equal(whole(open_images(path)), noise(1, seed=7))


def test_a_wrong_name_or_count_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must end in \.npz, got .*x\.npy"):
        write_npz(tmp_path / "x.npy", [noise(1)], 1)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        write_npz(tmp_path / "x.npz", [], 0)
    assert not list(tmp_path.iterdir())
