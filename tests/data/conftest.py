"""Fixtures for data tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from vision_ar.data.images import ImageDataModule


@pytest.fixture
def shared_data() -> Callable[[str], str]:
    """Give the folder of a real data set by its name, or skip the test."""
    here = Path(__file__).resolve()
    folders = [here.parents[2].parent / "shared" / "data", here.parents[2] / "shared" / "data"]
    if "VISION_AR_DATA" in os.environ:
        folders.insert(0, Path(os.environ["VISION_AR_DATA"]))

    def find(name: str) -> str:
        found = [folder / name for folder in folders if (folder / name).is_dir()]
        if not found:
            pytest.skip(f"no real data set {name}; set VISION_AR_DATA to the folder that holds it")
        return str(found[0])

    return find


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with 6 random pictures each, 10 pixels high and 12 wide."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(6):
            pixels = random.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{number}.png")
    return tmp_path / "set"


@pytest.fixture
def first_batch() -> Callable[..., dict[str, Tensor]]:
    """Set a data module up and give the first batch of a split."""

    def load(data: ImageDataModule, split: str = "train") -> dict[str, Tensor]:
        data.setup("fit")
        return next(iter(data.train_dataloader() if split == "train" else data.val_dataloader()))

    return load
