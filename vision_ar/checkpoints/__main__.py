"""Model folders: export what was trained, import what others published, list what can be imported, push to the Hub.

python -m vision_ar.checkpoints export SOURCE --out DIR
python -m vision_ar.checkpoints import FILE --family llamagen-gpt-b --image-size 256 --tokenizer FILE --out DIR
python -m vision_ar.checkpoints families
python -m vision_ar.checkpoints push DIR owner/name
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from vision_ar.checkpoints.hub import fetch, push
from vision_ar.checkpoints.importing import FAMILIES, add_import_options, import_model
from vision_ar.checkpoints.store import (
    CARD,
    describe,
    load_model,
    load_tokenizer,
    read_description,
    resolve,
    save_model,
)
from vision_ar.command_line import USER_ERRORS, OneLineParser, fail
from vision_ar.interfaces import Tokenizer

DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(args: Sequence[str] | None = None) -> None:
    """Export as the arguments say; user errors are one line and exit code 2."""
    given = parser().parse_args(args)
    try:
        COMMANDS[given.command](given)
    except USER_ERRORS as error:
        fail(error)


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    top = OneLineParser(prog="python -m vision_ar.checkpoints", description=__doc__.split("\n")[0])
    commands = top.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="copy a model without what only training needs")
    export.add_argument("source", help="model folder, training run, checkpoint or bundled name")
    export.add_argument("--out", type=Path, required=True, help="folder to write")
    export.add_argument("--dtype", choices=DTYPES, default="float32", help="of the stored weights (default float32)")
    export.add_argument("--card", type=Path, help="text of README.md; by default the source's")
    export.add_argument(
        "--tokenizer", help="model whose tokenizer is taken instead, with the same encoder and codebook"
    )
    export.add_argument(
        "--sampling",
        nargs="+",
        type=setting,
        metavar="NAME=VALUE",
        default=[],
        help="default settings of the model, for instance cfg_scale=1.5 temperature=0.9",
    )
    take = commands.add_parser("import", help="make a model folder of a published file")
    take.add_argument("source", help="the file, or hf:owner/name/file")
    take.add_argument("--out", type=Path, required=True, help="folder to write")
    take.add_argument("--dtype", choices=DTYPES, default="float32", help="of the stored weights (default float32)")
    add_import_options(take)
    commands.add_parser("families", help="list the published files that can be imported")
    push_to = commands.add_parser("push", help="upload a model folder to the Hugging Face Hub")
    push_to.add_argument("folder", type=Path, help="model folder")
    push_to.add_argument("repo", help="owner/name")
    return top


def run_export(given: argparse.Namespace) -> None:
    """The command `export`."""
    export_model(given.source, given.out, DTYPES[given.dtype], given.card, dict(given.sampling), given.tokenizer)


def run_import(given: argparse.Namespace) -> None:
    """The command `import`."""
    path = Path(fetch(given.source))
    tokenizer = None if given.tokenizer is None else Path(fetch(given.tokenizer))
    saved, reports = import_model(path, given.family, given.image_size, tokenizer)
    parts: dict[str, nn.Module] = {"tokenizer": saved.tokenizer}
    if saved.generator is not None:
        parts["generator"] = saved.generator
    text = "# Model card\n\nImported from published files.\n\n"
    text += "".join(f"- {report.line()}; published as {FAMILIES[report.family].source}\n" for report in reports)
    save_model(given.out, saved.description, parts, text, DTYPES[given.dtype])
    for report in reports:
        print(report.line())
    print(f"wrote {given.out} ({folder_size(given.out)})")


def run_families(given: argparse.Namespace) -> None:
    """The command `families`."""
    for family in FAMILIES.values():
        sizes = ", ".join(map(str, family.image_sizes))
        needs = f", needs {family.tokenizer}" if family.tokenizer else ""
        print(f"{family.name:20s} {family.part} at {sizes} pixels{needs}; {family.source}")


def run_push(given: argparse.Namespace) -> None:
    """The command `push`."""
    read_description(given.folder)  # a folder that is no model is said before anything is made on the Hub
    print(push(given.folder, given.repo))


COMMANDS = {"export": run_export, "import": run_import, "families": run_families, "push": run_push}


def setting(text: str) -> tuple[str, Any]:
    """Name and value of NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"sampling must be NAME=VALUE, got {text!r}")
    return name, yaml.safe_load(value)


def export_model(
    source: str,
    out: Path,
    dtype: torch.dtype | None = None,
    card: Path | None = None,
    sampling: dict[str, Any] | None = None,
    tokenizer: str | None = None,
) -> None:
    """Write a model folder without training-only parts and say how large it is."""
    saved = load_model(source)
    if tokenizer is not None:
        saved.tokenizer = same_tokens(saved.tokenizer, load_tokenizer(tokenizer), tokenizer)
    saved.tokenizer.drop_training_parts()
    described = saved.description
    described.tokenizer = describe(saved.tokenizer)
    described.sampling |= sampling or {}
    parts: dict[str, nn.Module] = {"tokenizer": saved.tokenizer}
    if saved.generator is not None:
        parts["generator"] = saved.generator
    found = resolve(source) / CARD
    text = card.read_text() if card else found.read_text() if found.is_file() else "# Model card\n"
    save_model(out, described, parts, text, dtype)
    print(f"wrote {out} ({folder_size(out)})")


def folder_size(folder: Path) -> str:
    """Of its files, for people."""
    return f"{sum(file.stat().st_size for file in folder.iterdir()) / 2**20:.1f} MiB"


def same_tokens(tokenizer: Tokenizer, other: Tokenizer, source: str) -> Tokenizer:
    """The other tokenizer, after a check that it was trained on from this one with the tokens frozen."""
    makers, others = tokenizer.token_makers(), other.token_makers()
    for name, value in makers.items():
        found = others.get(name)
        same = torch.equal(found, value) if isinstance(found, Tensor) and isinstance(value, Tensor) else found == value
        if not same:
            raise ValueError(f"tokenizer must make the same tokens, got {source} where {name} differs")
    return other


if __name__ == "__main__":
    main()
