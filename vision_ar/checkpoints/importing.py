"""From a published file to a model of ours, in memory; `python -m vision_ar.checkpoints import` saves it."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vision_ar.checkpoints import dar, llamagen
from vision_ar.checkpoints.families import Family, Report, back, convert, without_use
from vision_ar.checkpoints.foreign import read_foreign, read_pickle
from vision_ar.checkpoints.hub import fetch
from vision_ar.checkpoints.store import (
    DESCRIPTION_KEY,
    Description,
    SavedModel,
    build,
    describe,
    load_model,
    load_tokenizer,
    resolve,
    sha_of,
)
from vision_ar.generator import Generator
from vision_ar.interfaces import Backbone, Objective, Tokenizer

FAMILIES: dict[str, Family] = {family.name: family for family in (*llamagen.FAMILIES, *dar.FAMILIES)}
NEXT_TOKEN = {"class_path": "vision_ar.objectives.next_token.NextToken", "init_args": {}}


def open_model(
    source: str | Path,
    family: str | None = None,
    image_size: int | None = None,
    tokenizer: str | Path | None = None,
) -> SavedModel:
    """Any model: what `load_model` opens, or a published file of a known family.

    Args:
        source: bundled name, model folder, training run, checkpoint, published file, or `hf:owner/name[/file]`.
        family: of a published file; None finds it by names and shapes where they decide.
        image_size: in pixels, of a published file; None is the published one where there is only one.
        tokenizer: file or folder of the tokenizer, for published generators.

    Raises:
        FileNotFoundError: when there is no such model.
        ValueError: when it is damaged, of no known family, or when more has to be said.
    """
    path = resolve(fetch(source))
    if is_ours(path):
        for name, value in (("family", family), ("image_size", image_size), ("tokenizer", tokenizer)):
            if value is not None:
                raise ValueError(f"{name} must be left out for a model of this project, got {value} for {source}")
        return load_model(path)
    return import_model(path, family, image_size, None if tokenizer is None else Path(fetch(tokenizer)))[0]


def is_ours(path: Path) -> bool:
    """True for model folders and for checkpoints of this project's trainings."""
    if path.is_dir():
        return True
    if path.suffix == ".safetensors":
        return False
    content = read_pickle(path)
    return isinstance(content, Mapping) and DESCRIPTION_KEY in content


def import_model(
    path: Path, family: str | None = None, image_size: int | None = None, tokenizer: Path | None = None
) -> tuple[SavedModel, list[Report]]:
    """A published file as a model in evaluation mode, and what became of its tensors; arguments as above."""
    kind = find_family(path, family)
    size = pick_image_size(kind, image_size)
    if kind.part == "tokenizer":
        made, reports = import_tokenizer(path, kind.name, size)
        described, generator = Description(describe(made)), None
    else:
        weights, taken_from = read_foreign(path, kind.sets)
        if tokenizer is None:
            known = FAMILIES[str(kind.tokenizer)]
            raise ValueError(
                f"tokenizer must name the file or folder of {known.name} for {kind.name}, got None; it is published as "
                f"{known.source}"
            )
        made, reports = tokenizer_for(kind, tokenizer, size)
        generator = Generator(made.spec, lambda spec: build(kind.describe(size), Backbone, spec), next_token())
        reports = [fill(generator, kind, weights, taken_from), *reports]
        described = Description(describe(made), kind.describe(size), NEXT_TOKEN, sampling=kind.sampling(size))
    digest = hashlib.sha256(f"{kind.name} {size}".encode())
    for file in (path, *([tokenizer] if tokenizer is not None and tokenizer.is_file() else [])):
        digest.update(sha_of(file).digest())
    return SavedModel(path.stem, described, made, generator, digest.hexdigest()[:16]), reports


def import_tokenizer(path: Path, family: str, image_size: int) -> tuple[Tokenizer, list[Report]]:
    """A published tokenizer for images of this size."""
    kind = FAMILIES[family]
    weights, taken_from = read_foreign(path, kind.sets)
    made = build(kind.describe(image_size), Tokenizer)
    return made, [fill(made, kind, weights, taken_from)]


def tokenizer_for(kind: Family, path: Path, image_size: int) -> tuple[Tokenizer, list[Report]]:
    """The tokenizer of a published generator: a published file, or a model of ours with it."""
    if path.is_file() and not is_ours(path):
        return import_tokenizer(path, find_family(path, kind.tokenizer).name, image_size)
    made = load_tokenizer(path)
    wanted = meta_tokenizer(FAMILIES[str(kind.tokenizer)], image_size).spec
    if (made.spec.seq_len, made.spec.vocab_size) != (wanted.seq_len, wanted.vocab_size):
        raise ValueError(
            f"tokenizer must make {wanted.seq_len} tokens of {wanted.vocab_size} ids for {kind.name} at {image_size} "
            f"pixels, got {made.spec.seq_len} of {made.spec.vocab_size} in {path}"
        )
    return made, []


def fill(module: nn.Module, kind: Family, weights: Mapping[str, Tensor], taken_from: str) -> Report:
    """Load published tensors into our module, strictly, and freeze it."""
    ours, report = convert(kind, weights, taken_from)
    own = module.state_dict()
    for name, value in ours.items():
        if own[name].shape != value.shape:
            raise ValueError(
                f"the file must be {kind.name}, but {name} has shape {tuple(value.shape)} in place of "
                f"{tuple(own[name].shape)}"
            )
    left = set(module.load_state_dict({k: v.float() for k, v in ours.items()}, strict=False).missing_keys)
    counted = {name for name in own if name.endswith(("seen_tokens", "last_used"))}
    if left != left & counted:
        raise RuntimeError(f"the table of {kind.name} must name every tensor, it lacks {sorted(left - counted)[0]}")
    module.eval().requires_grad_(False)
    return report


def find_family(path: Path, name: str | None) -> Family:
    """The family of a file, by its name, or by the names and shapes in the file where they decide."""
    if name is not None:
        if name not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {name!r}")
        return FAMILIES[name]
    weights = {sets: read_foreign(path, sets)[0] for sets in {kind.sets for kind in FAMILIES.values()}}
    fitting = [kind for kind in FAMILIES.values() if fits(kind, weights[kind.sets])]
    if not fitting:
        raise ValueError(
            f"model must be of this project or of a known family ({', '.join(FAMILIES)}), {path} has other tensors; "
            "name the family to hear what differs"
        )
    if len(fitting) > 1:
        names = " or ".join(kind.name for kind in fitting)
        raise ValueError(f"family must be named for {path}: {names} have the same tensors and compute other things")
    return fitting[0]


def fits(kind: Family, weights: Mapping[str, Tensor]) -> bool:
    """True when names and shapes are those of the family."""
    unused = without_use(weights)
    found = {name: tuple(value.shape) for name, value in weights.items() if name not in unused}
    if found.keys() != {name for entry in kind.entries() for name in entry.published}:
        return False  # before anything is built
    return found == published_shapes(kind)


def published_shapes(kind: Family) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a published file that has a place here."""
    return {name: tuple(value.shape) for name, value in back(kind, meta_module(kind).state_dict()).items()}


def meta_module(kind: Family) -> nn.Module:
    """Our module for a family, without memory."""
    size = kind.image_sizes[0]
    if kind.part == "tokenizer":
        return meta_tokenizer(kind, size)
    spec = meta_tokenizer(FAMILIES[str(kind.tokenizer)], size).spec
    with torch.device("meta"):
        return Generator(spec, lambda spec: build(kind.describe(size), Backbone, spec), next_token())


def meta_tokenizer(kind: Family, image_size: int) -> Tokenizer:
    """The tokenizer of a family, without memory."""
    with torch.device("meta"):
        return build(kind.describe(image_size), Tokenizer)


def next_token() -> Any:
    """The objective of all generators that are published so far."""
    return build(NEXT_TOKEN, Objective)


def pick_image_size(kind: Family, image_size: int | None) -> int:
    """The size that was asked for, or the only one published."""
    if image_size is not None:
        return image_size
    if len(kind.image_sizes) > 1 and kind.part == "generator":
        sizes = " or ".join(map(str, kind.image_sizes))
        raise ValueError(f"image_size must be given for {kind.name}: files for {sizes} pixels look the same")
    return kind.image_sizes[0]


def add_import_options(p: argparse.ArgumentParser) -> None:
    """Add the options that say what a published file is."""
    p.add_argument("--family", help="of a published file, where names and shapes do not decide")
    p.add_argument("--image-size", type=int, help="in pixels, of a published file, where several look the same")
    p.add_argument("--tokenizer", help="file or folder of the tokenizer of a published generator")
