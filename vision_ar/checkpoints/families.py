"""Published checkpoints: for every family what it becomes here, and where each of its tensors goes.

A family is a table. `Entry` rows name one tensor of ours and the published tensors it is made of, so that the same
table imports and exports; `NO_USE` says which published tensors have no place here, and why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NO_USE = {
    r"codebook_used$": "counts of codes from its training",
    r"freqs_cis$": "a table of rotations, which is computed here",
    r"\.repa_out\.": "a head for alignment with DINOv2, which only its training used",
}
"""Published tensors without a place here, by a pattern of their names, with the reason."""


@dataclass(frozen=True)
class Entry:
    """One tensor of ours.

    Args:
        ours: its name.
        published: the tensors it is made of, stacked along the outputs.
        matrix: True where a published 1x1 convolution is a matrix here.
    """

    ours: str
    published: tuple[str, ...]
    matrix: bool = False

    def take(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Ours from the published ones."""
        parts = [weights[name] for name in self.published]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        return value[..., 0, 0] if self.matrix and value.dim() == 4 else value

    def give(self, value: Tensor) -> dict[str, Tensor]:
        """The published ones from ours; parts are of equal size."""
        if self.matrix:
            value = value[..., None, None]
        return dict(zip(self.published, value.chunk(len(self.published)), strict=True))


@dataclass(frozen=True)
class Family:
    """One kind of published file.

    Args:
        name: as `--family` takes it.
        part: tokenizer or generator.
        entries: where its tensors go, for the module that `describe` describes.
        describe: class path and arguments by the image size.
        image_sizes: of the published files of this family, in pixels.
        sets: names under which the file may hold its weights, the one that counts first.
        tokenizer: for generators, the family of their tokenizer, which has a file of its own.
        sampling: settings of the published samples, by the image size.
        source: where the file is published, and its name there.
    """

    name: str
    part: str
    entries: Callable[[], list[Entry]]
    describe: Callable[[int], dict[str, Any]]
    image_sizes: tuple[int, ...]
    sets: tuple[str, ...]
    source: str
    tokenizer: str | None = None
    sampling: Callable[[int], dict[str, Any]] = lambda image_size: {}


@dataclass
class Report:
    """What became of the tensors of a file."""

    family: str
    taken_from: str
    used: list[str]
    skipped: dict[str, str]
    """Published names with the reason."""

    def line(self) -> str:
        """The same in one line."""
        reasons = sorted({reason for reason in self.skipped.values()})
        left = f", {len(self.skipped)} skipped ({'; '.join(reasons)})" if self.skipped else ""
        return f"{self.family}: {len(self.used)} tensors from {self.taken_from}{left}"


def convert(family: Family, weights: Mapping[str, Tensor], taken_from: str) -> tuple[dict[str, Tensor], Report]:
    """Our tensors by name from published ones; every one is used or named as skipped.

    Raises:
        ValueError: when tensors are missing or left over.
    """
    entries = family.entries()
    known = {name for entry in entries for name in entry.published}
    skipped = without_use(weights)
    extra, missing = sorted(weights.keys() - known - skipped.keys()), sorted(known - weights.keys())
    if extra or missing:
        told = [f"lacks {missing[0]}" + others(missing)] if missing else []
        told += [f"has {extra[0]} too" + others(extra)] if extra else []
        raise ValueError(f"the file must be {family.name}, but it {' and it '.join(told)}")
    ours = {entry.ours: entry.take(weights) for entry in entries}
    return ours, Report(family.name, taken_from, sorted(known), skipped)


def without_use(names: Iterable[str]) -> dict[str, str]:
    """Those of the names that have no place here, with the reason."""
    return {name: reason for name in names for pattern, reason in NO_USE.items() if re.search(pattern, name)}


def others(names: list[str]) -> str:
    """How many more there are."""
    return f" and {len(names) - 1} others" if len(names) > 1 else ""


def back(family: Family, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors by name from ours."""
    return {name: value for entry in family.entries() for name, value in entry.give(ours[entry.ours]).items()}
