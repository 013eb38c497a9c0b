"""Inception weights for all tests that need some: random, as the official file is not part of the project."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_fidelity import FeatureExtractorInceptionV3


class Blank(FeatureExtractorInceptionV3):
    """Inception as it is built, before weights are read."""

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return None


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of random weights under which activations neither vanish nor explode, so that images differ."""
    nothing, draws = io.BytesIO(), torch.Generator().manual_seed(0)
    torch.save({}, nothing)
    nothing.seek(0)
    weights = Blank("blank", ["2048"], nothing).state_dict()
    for name, value in weights.items():
        if name.endswith("conv.weight"):
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=draws)
        elif name.endswith(("bn.weight", "running_var")):
            value.uniform_(0.8, 1.2, generator=draws)
        elif value.is_floating_point():
            value.normal_(0, 0.1, generator=draws)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(weights, path)
    yield path
    path.unlink()  # 95 MB
