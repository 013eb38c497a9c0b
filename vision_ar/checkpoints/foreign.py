"""Open checkpoints of other projects as plain tensors; whatever else a file holds is never run."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

COMPILED = "_orig_mod."
"""What `torch.compile` puts before the names of a saved module."""


class Inert:
    """Stands for any class that a file names: it takes whatever it is given and does nothing."""

    def __init__(self, *args: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_foreign(path: Path, sets: Sequence[str]) -> tuple[dict[str, Tensor], str]:
    """Tensors of a file by name, and the name of the set they were in; "the file itself" when there are no sets.

    Args:
        path: safetensors file, or what `torch.save` wrote.
        sets: names under which a dictionary of weights may lie, the one that counts first.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is truncated, no checkpoint, or holds no tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint must be a file, got {path}")
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold weights by name, got a {type(content).__name__}")
    name = next((one for one in sets if isinstance(content.get(one), Mapping)), None)
    weights: Mapping[Any, Any] = content if name is None else content[name]  # type: ignore[assignment]
    tensors = {key.removeprefix(COMPILED): value for key, value in weights.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} must hold weights by name, got {', '.join(map(str, list(content)[:5])) or 'nothing'}")
    return tensors, "the file itself" if name is None else name


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a whole safetensors file, got: {error}") from error


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote, with `Inert` in place of every class that is not made of tensors."""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Inert, name) for name in named]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        first = " ".join(str(error).split())[:160]
        raise ValueError(f"{path} must be a whole file of torch.save with plain tensors, got: {first}") from error
