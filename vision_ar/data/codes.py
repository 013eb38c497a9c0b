"""Reading cached codes: the tokens of a whole image set, written once by `vision_ar.data.cache_codes`."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from vision_ar.interfaces import Tokenizer

RECORD_NAME = "codes.json"
COMMAND = "python -m vision_ar.data.cache_codes"


@dataclass
class CodesRecord:
    """What a folder of cached codes says about itself in `codes.json`.

    Args:
        vocab_size: number of ids.
        seq_len: tokens of one image.
        image_size: of the images that were encoded.
        tokenizer: `tokenizer_hash` of the tokenizer.
        class_names: names of the class ids 0, 1, ...
        variants: views of every image, by split.
        count: number of images, by split.
        done: how many of them are written, by split.
        complete: True when nothing is left to be written.
    """

    vocab_size: int
    seq_len: int
    image_size: int
    tokenizer: str
    class_names: list[str]
    variants: dict[str, int] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)
    complete: bool = False

    @classmethod
    def read(cls, folder: Path) -> CodesRecord:
        """Read the record of a folder.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it cannot be understood.
        """
        path = folder / RECORD_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; make the codes with: {COMMAND} ... --out {folder}")
        try:
            return cls(**json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} must be a record of cached codes, got {error}") from error

    def write(self, folder: Path) -> None:
        """Replace the record of a folder in one step, so that an interruption never leaves half of it."""
        partial = folder / f"{RECORD_NAME}.partial"
        partial.write_text(json.dumps(asdict(self), indent=1))
        os.replace(partial, folder / RECORD_NAME)

    def shape(self, split: str) -> tuple[int, int, int]:
        """Shape of the codes of a split, (N, variants, T)."""
        return self.count[split], self.variants[split], self.seq_len

    def dtype(self) -> np.dtype:
        """Smallest of uint16 and int32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.int32)


class CachedCodes:
    """One split of a folder of cached codes, memory-mapped.

    Args:
        path: folder that `python -m vision_ar.data.cache_codes` wrote.
        split: train or val.

    Raises:
        FileNotFoundError: if the folder or a file in it is missing.
        ValueError: if the folder is incomplete, lacks the split, or its arrays do not fit its record.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        folder = Path(path)
        self._arguments = (path, split)
        self.record = record = CodesRecord.read(folder)
        if not record.complete:
            state = ", ".join(f"{record.done[name]} of {count} {name}" for name, count in record.count.items())
            raise ValueError(f"{folder} must hold complete codes, got {state} images; run the same {COMMAND} again")
        if split not in record.count:
            raise ValueError(f"split of {folder} must be one of {', '.join(record.count)}, got {split!r}")
        self.codes = open_array(folder / split / "codes.npy", record.shape(split), record.dtype())
        self.labels = open_array(folder / split / "labels.npy", (record.count[split],), np.dtype(np.int64))

    def __reduce__(self) -> tuple[type[CachedCodes], tuple[str | Path, str]]:
        return CachedCodes, self._arguments  # a worker process maps the files again and copies nothing

    def __len__(self) -> int:
        return len(self.labels)

    def ids(self, indices: Tensor, variants: Tensor) -> Tensor:
        """Tokens of the given images and views, both (B,), as (B, T), int64."""
        return torch.from_numpy(self.codes[indices.numpy(), variants.numpy()].astype(np.int64))


def open_array(path: Path, shape: tuple[int, ...], dtype: np.dtype, mode: str = "r") -> np.memmap:
    """Memory-map a .npy file and check it; mode "r" reads, "r+" also writes, "w+" makes a new file.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if the file is cut off, or has another shape or kind of number.
    """
    if mode == "w+":
        path.parent.mkdir(parents=True, exist_ok=True)
        return open_memmap(path, mode=mode, dtype=dtype, shape=shape)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; delete {path.parents[1]} and run {COMMAND} again")
    try:
        array = open_memmap(path, mode=mode)
    except ValueError as error:
        raise ValueError(f"{path} must be a whole .npy file, got: {error}") from error
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{path} must hold {dtype} {shape} as {RECORD_NAME} says, got {array.dtype} {array.shape}")
    return array


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Fingerprint of what makes the tokens; two tokenizers with the same one write the same codes."""
    digest = hashlib.sha256(type(tokenizer).__qualname__.encode())
    for name, value in sorted(tokenizer.token_makers().items()):
        if not isinstance(value, Tensor):
            digest.update(f"{name} {value}".encode())
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
