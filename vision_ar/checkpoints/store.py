"""Saved models: a folder with `config.yaml`, `model.safetensors` and `README.md`.

`config.yaml` names the classes and their arguments; only classes of this package are ever built from it, and weights
are opened as plain tensors. A Lightning checkpoint carries the same description and can be used in its place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vision_ar.generator import Generator
from vision_ar.interfaces import Backbone, Objective, Recorded, Tokenizer, TokenSpec

CONFIG, WEIGHTS, CARD = "config.yaml", "model.safetensors", "README.md"
DESCRIPTION_KEY = "vision_ar"
"""Where a Lightning checkpoint keeps what `config.yaml` holds."""
BUNDLED = Path(__file__).resolve().parents[1] / "models"


@dataclass
class Description:
    """What `config.yaml` says.

    Args:
        tokenizer: class path and arguments.
        backbone: likewise, None when only a tokenizer is saved.
        objective: likewise.
        class_names: names of the labels in order; may be empty.
        sampling: default settings of `sample.py` for this model.
    """

    tokenizer: dict[str, Any]
    backbone: dict[str, Any] | None = None
    objective: dict[str, Any] | None = None
    class_names: list[str] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass
class SavedModel:
    """A model read from disk."""

    name: str
    description: Description
    tokenizer: Tokenizer
    generator: Generator | None
    digest: str
    """First 16 hex digits of the SHA-256 of the weights file."""


def bundled_names() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))


def describe(part: Recorded) -> dict[str, Any]:
    """Class path and arguments of a tokenizer, backbone or objective as plain values."""
    arguments = {name: plain(value) for name, value in part.init_args.items() if not isinstance(value, TokenSpec)}
    return {"class_path": f"{type(part).__module__}.{type(part).__qualname__}", "init_args": arguments}


def plain(value: Any) -> Any:
    """Turn an argument into what YAML can hold."""
    if isinstance(value, Recorded):
        return describe(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def build(described: dict[str, Any], base: type, *arguments: Any) -> Any:
    """Build what `describe` described.

    Args:
        described: class path and arguments.
        base: the class must be a subclass of this and live in this package.
        *arguments: first arguments that are not part of the description, such as the token spec.

    Raises:
        ValueError: for any other class, or arguments that do not fit it.
    """
    path = str(described.get("class_path"))
    module, _, name = path.rpartition(".")
    if not module.startswith("vision_ar."):
        raise ValueError(f"class_path must name a class of vision_ar, got {path}")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"class_path must name a class that exists, got {path}") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"class_path must name a {base.__name__}, got {path}")
    # jsonargparse turns nested dictionaries into the dataclasses and parts that the signature asks for
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "part", skip={len(arguments)} if arguments else None, instantiate=False)
    try:
        parsed = parser.instantiate(parser.parse_object({"part": described.get("init_args") or {}}))
    except Exception as error:  # jsonargparse raises many kinds; all mean that the file does not fit the class
        raise ValueError(f"arguments of {path} must fit the class: {' '.join(str(error).split())}") from error
    return cls(*arguments, **vars(parsed.part))


def save_model(
    folder: str | Path,
    description: Description,
    parts: Mapping[str, nn.Module | Mapping[str, Tensor]],
    card: str,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a model folder.

    Args:
        folder: made if needed; files of an earlier save are replaced.
        description: of the parts.
        parts: modules, or their tensors by name; tokenizer and generator.
        card: text of README.md: data, numbers, limits.
        dtype: floating-point weights are stored in this; None keeps theirs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: part.state_dict() if isinstance(part, nn.Module) else part for name, part in parts.items()}
    weights = {f"{name}.{key}": value for name, part in tensors.items() for key, value in part.items()}
    weights = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in weights.items()}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as scratch:
        save_file({key: value.contiguous().cpu() for key, value in weights.items()}, Path(scratch) / WEIGHTS)
        (Path(scratch) / CONFIG).write_text(yaml.safe_dump(dataclasses.asdict(description), sort_keys=False))
        (Path(scratch) / CARD).write_text(card)
        for file in (WEIGHTS, CONFIG, CARD):  # whole files only, whenever the writing is stopped
            os.replace(Path(scratch) / file, folder / file)
    return folder


def resolve(source: str | Path) -> Path:
    """Find a model: bundled name, model folder, training run (its newest `model` folder) or checkpoint file.

    Raises:
        FileNotFoundError: naming the known models.
    """
    path = Path(source)
    if path.is_file():
        return path
    if str(source) and path.is_dir():
        found = [path] if (path / CONFIG).is_file() and (path / WEIGHTS).is_file() else []
        found += sorted(path.glob(f"**/model/{WEIGHTS}"), key=lambda file: file.stat().st_mtime)
        if found:
            return found[-1] if found[-1].is_dir() else found[-1].parent
        raise FileNotFoundError(f"model must be a folder with {CONFIG} and {WEIGHTS}, {source} has neither")
    if (BUNDLED / str(source) / CONFIG).is_file() and "/" not in str(source):
        return BUNDLED / str(source)
    known = ", ".join(bundled_names()) or "none"
    raise FileNotFoundError(
        f"model must be a bundled name ({known}), a folder or a checkpoint file, got {source or 'an empty name'}"
    )


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """All tensors of a saved model, by name; opened as plain tensors, never as code.

    Raises:
        ValueError: when the file is corrupt, truncated or no checkpoint.
    """
    return _read(resolve(source))[1]


def read_description(source: str | Path) -> Description:
    """What a saved model consists of."""
    return _read(resolve(source))[0]


def load_model(source: str | Path) -> SavedModel:
    """Open a saved model in evaluation mode on the CPU, float32.

    Raises:
        FileNotFoundError: when there is no such model.
        ValueError: when its files are damaged or do not fit each other.
    """
    path = resolve(source)
    description, weights = _read(path)
    tokenizer = build(description.tokenizer, Tokenizer)
    parts: dict[str, nn.Module] = {"tokenizer": tokenizer}
    generator = None
    if description.backbone is not None and description.objective is not None:
        objective, described = build(description.objective, Objective), description.backbone
        generator = Generator(tokenizer.spec, lambda spec: build(described, Backbone, spec), objective)
        parts["generator"] = generator
    for name, part in parts.items():
        own = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}
        try:
            part.load_state_dict(own, strict=True)
        except RuntimeError as error:
            raise ValueError(f"weights of {source} must fit its {CONFIG}: {' '.join(str(error).split())}") from error
        part.eval().requires_grad_(False)
    file = path if path.is_file() else path / WEIGHTS
    digest = sha_of(file)
    parts_of = (description.tokenizer, description.backbone, description.objective)  # decoding settings are in there
    digest.update(json.dumps(parts_of, sort_keys=True).encode())
    given = Path(source).resolve()
    return SavedModel(
        given.stem if given.is_file() else given.name, description, tokenizer, generator, digest.hexdigest()[:16]
    )


def sha_of(path: Path) -> Any:
    """The sha256 of a file, from hashlib, to be read or gone on with; a file of any size takes little memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Only the tokenizer of a saved model."""
    return load_model(source).tokenizer


def _read(path: Path) -> tuple[Description, dict[str, Tensor]]:
    try:
        if path.is_dir():
            with safe_open(str(path / WEIGHTS), framework="pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
            config = yaml.safe_load((path / CONFIG).read_text())
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            weights, config = checkpoint["state_dict"], checkpoint[DESCRIPTION_KEY]
        return Description(**config), {name: _widen(value) for name, value in weights.items()}
    except (SafetensorError, OSError, EOFError, RuntimeError, yaml.YAMLError) as error:
        raise ValueError(f"model files must be whole, {path} is damaged: {' '.join(str(error).split())}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"model must be one that vision_ar saved, {path} is not: {error}") from error
    except Exception as error:  # the unpickler's refusals have no common base, and advise to run the file as code
        raise ValueError(
            f"{path} must be a checkpoint of plain tensors, it was refused ({type(error).__name__})"
        ) from error


def _widen(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
