"""What all tests share: one thread, seeded generators, and the folder with facts about published systems."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small tensors: more threads only wait for each other


def seeded(seed: int) -> torch.Generator:
    """A random generator of its own, so that no test depends on another."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def shared_reference() -> Path:
    """The folder with the recorded outputs of published systems, or skip the test."""
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "reference"
    folder = Path(os.environ.get("VISION_AR_REFERENCE", beside))
    if not folder.is_dir():
        pytest.skip("no recorded outputs of published systems; set VISION_AR_REFERENCE to the folder that holds them")
    return folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
