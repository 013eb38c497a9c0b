"""Encode an image set once and keep its tokens on disk, so that generators train without the tokenizer.

    python -m vision_ar.data.cache_codes --tokenizer runs/vq --data configs/generators/dar_cifar10.yaml --out codes/vq

writes `codes.npy`, (N, variants, T), and `labels.npy`, (N,), for every split, and `codes.json`. The same command goes
on after an interruption. Read the result with `codes: codes/vq` in the data section of a config.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vision_ar.command_line import USER_ERRORS, OneLineParser, fail
from vision_ar.data.codes import RECORD_NAME, CodesRecord, open_array, tokenizer_hash
from vision_ar.data.image_sets import ImageSet
from vision_ar.data.images import ImageDataModule
from vision_ar.data.pixels import normalise
from vision_ar.interfaces import Tokenizer

VARIANTS = (1, 2, 10)
TEN_CROP_ZOOM = 1.1
"""Side of the squares that ten crops are cut from, over the image size (LlamaGen, extract_codes_c2i.py)."""


def cache_codes(
    tokenizer: Tokenizer,
    datamodule: ImageDataModule,
    out: str | Path,
    splits: Sequence[str] = ("train", "val"),
    variants: int = 1,
    batch_size: int = 64,
) -> CodesRecord:
    """Write the tokens of an image set, or go on with a folder that is not complete.

    Args:
        tokenizer: for discrete tokens; it runs on the device of its weights.
        datamodule: of the images; its `codes`, random flips and random crops are not used.
        out: folder to write.
        splits: train, val or both.
        variants: views of every training image: 1 plain, 2 also mirrored, 10 five crops and their mirror images. Other
            splits always get the plain view.
        batch_size: images that are encoded at once.

    Raises:
        ValueError: if an argument is out of range, or the folder holds codes of other data or another tokenizer.
    """
    if variants not in VARIANTS:
        raise ValueError(f"variants must be one of {VARIANTS}, got {variants}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not set(splits) <= {"train", "val"} or not splits:
        raise ValueError(f"splits must be train, val or both, got {', '.join(splits) or 'none'}")
    datamodule.prepare_data()
    folder, was_training = Path(out), tokenizer.training
    record = _open_record(tokenizer, datamodule, folder)
    tokenizer.eval()
    try:
        for split in splits:
            images = _open_split(datamodule, record, folder, split, variants if split == "train" else 1)
            _write_split(tokenizer, images, record, folder, split, batch_size)
    finally:
        tokenizer.train(was_training)
    record.complete = all(record.done[split] == count for split, count in record.count.items())
    record.write(folder)
    return record


def _open_record(tokenizer: Tokenizer, datamodule: ImageDataModule, folder: Path) -> CodesRecord:
    """The record of the folder, after a check that it belongs to this tokenizer and data, or a new one."""
    spec = tokenizer.spec
    if spec.vocab_size is None:
        raise ValueError(f"tokenizer must make discrete tokens to be cached, got {type(tokenizer).__name__}")
    names = datamodule.source("train").class_names  # not those of `codes`, which may be the folder to be written
    wanted = CodesRecord(spec.vocab_size, spec.seq_len, datamodule.image_size, tokenizer_hash(tokenizer), names)
    if not (folder / RECORD_NAME).is_file():
        return wanted
    record = CodesRecord.read(folder)
    for name in ("vocab_size", "seq_len", "image_size", "tokenizer", "class_names"):
        _check_same(name, folder, getattr(wanted, name), getattr(record, name))
    return record


def _check_same(name: str, folder: Path, wanted: object, found: object) -> None:
    if wanted != found:
        raise ValueError(f"{name} of the codes in {folder} must be {wanted}, got {found}; choose another folder")


def _open_split(datamodule: ImageDataModule, record: CodesRecord, folder: Path, split: str, variants: int) -> ImageSet:
    """The images of a split, after a check that they fit the record, or an entry for them in it."""
    side = int(datamodule.image_size * TEN_CROP_ZOOM) if variants == 10 else datamodule.image_size
    images = datamodule.image_set(split, side)
    _check_same(f"{split} variants", folder, variants, record.variants.setdefault(split, variants))
    _check_same(f"{split} count", folder, len(images), record.count.setdefault(split, len(images)))
    record.done.setdefault(split, 0)
    return images


def _write_split(
    tokenizer: Tokenizer, images: ImageSet, record: CodesRecord, folder: Path, split: str, batch_size: int
) -> None:
    """Encode what is not done yet; after every batch the record says how far it came."""
    count, done = record.count[split], record.done[split]
    if done == count:
        return
    record.complete = False
    mode = "r+" if done else "w+"
    codes = open_array(folder / split / "codes.npy", record.shape(split), record.dtype(), mode)
    labels = open_array(folder / split / "labels.npy", (count,), np.dtype(np.int64), mode)
    with tqdm(total=count, initial=done, desc=split, unit="image") as bar:
        for start in range(done, count, batch_size):
            stop = min(start + batch_size, count)
            pixels, classes, bad = images.squares(torch.arange(start, stop))
            images.report(bad)
            for variant, view in enumerate(image_views(pixels, record.image_size, record.variants[split])):
                codes[start:stop, variant] = _encode(tokenizer, view).numpy()
            labels[start:stop] = classes.numpy()
            codes.flush()  # before the record says that the codes are there
            labels.flush()
            record.done[split] = stop
            record.write(folder)
            bar.update(stop - start)


def image_views(pixels: Tensor, image_size: int, variants: int) -> list[Tensor]:
    """Views of a batch, each (B, C, image_size, image_size), uint8; the first is the plain one.

    Args:
        pixels: squares, (B, C, side, side), uint8; the side is image_size, or larger for ten crops.
        image_size: of the views.
        variants: 1 plain, 2 also mirrored, 10 centre and corners and their mirror images.
    """
    edge = pixels.shape[-1] - image_size
    places = [(edge // 2, edge // 2)]
    if variants == 10:
        places += [(0, 0), (0, edge), (edge, 0), (edge, edge)]
    crops = [pixels[..., top : top + image_size, left : left + image_size] for top, left in places]
    return crops if variants == 1 else crops + [crop.flip(-1) for crop in crops]


@torch.inference_mode()
def _encode(tokenizer: Tokenizer, pixels: Tensor) -> Tensor:
    """Ids of a batch of pixels, (B, T), on the CPU, checked."""
    device = next((weights.device for weights in tokenizer.parameters()), pixels.device)
    ids = tokenizer.encode(normalise(pixels.to(device))).ids
    shape = (len(pixels), tokenizer.spec.seq_len)
    if ids is None or ids.shape != shape:
        raise ValueError(f"tokenizer must give ids of shape {shape}, got {None if ids is None else tuple(ids.shape)}")
    low, high, vocab_size = int(ids.min()), int(ids.max()), tokenizer.spec.vocab_size
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise ValueError(f"tokenizer must give ids from 0 to {vocab_size} - 1, got {low} to {high}")
    return ids.cpu()


def load_data(path: str, root: str | None = None) -> ImageDataModule:
    """Build the data module of a YAML file: the `data` section of a training config, or a class_path by itself.

    Args:
        path: of the YAML file.
        root: replaces the folder that the file names.
    """
    import jsonargparse
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
        section = content.get("data", content)
        if root is not None:
            section["init_args"] = {**section.get("init_args", {}), "root": root}
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(ImageDataModule, "data", required=True)
        options = parser.parse_object({"data": section})
    except (AttributeError, yaml.YAMLError, jsonargparse.ArgumentError) as error:
        raise ValueError(f"{path} must be YAML with the class_path of an image data module, got: {error}") from error
    return parser.instantiate(options).data


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m vision_ar.data.cache_codes", description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", required=True, help="saved model folder, bundled name or Lightning checkpoint")
    parser.add_argument("--data", required=True, help="YAML file with a data section, for instance a training config")
    parser.add_argument("--root", help="folder of the images, in place of the one that the file names")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--split", nargs="+", default=["train", "val"], choices=["train", "val"], help="what to encode")
    parser.add_argument("--variants", type=int, default=1, choices=VARIANTS, help="views of a training image")
    parser.add_argument("--batch-size", type=int, default=64, help="images that are encoded at once")
    parser.add_argument("--device", help="where the tokenizer runs; an accelerator if there is one")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake ends it with one line and exit code 2."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        from vision_ar.checkpoints.store import load_tokenizer

        accelerator = torch.accelerator.current_accelerator(check_available=True)
        tokenizer = load_tokenizer(options.tokenizer).to(options.device or accelerator or torch.device("cpu"))
        data = load_data(options.data, options.root)
        cache_codes(tokenizer, data, options.out, options.split, options.variants, options.batch_size)
        if bad := len(data.bad_images):
            print(f"{bad} images could not be read; each was named above with its path", file=sys.stderr)
    except KeyboardInterrupt:
        parser.exit(130, "stopped; run the same command again to go on\n")
    except USER_ERRORS as error:
        fail(error)


if __name__ == "__main__":
    main()
