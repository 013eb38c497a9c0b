"""What `sample.py` does: read arguments, sample, write a folder of pictures."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from vision_ar.checkpoints.importing import add_import_options
from vision_ar.command_line import USER_ERRORS, OneLineParser, check_writable, fail
from vision_ar.data.text_features import TextFeatures
from vision_ar.interfaces import ImageTokenizer
from vision_ar.pictures import columns_for, grid, read_image, save_previews, to_pil
from vision_ar.pipeline import Pipeline, Samples, load
from vision_ar.sampler.engine import Condition, Event
from vision_ar.sampler.limit import token_seconds
from vision_ar.sampling_options import (
    add_sampling_options,
    add_weight_options,
    pick_device,
    sampling_options,
    step_options,
    weight_options,
)

DEFAULT_MODEL, DEFAULT_NUM = "cifar10-dar", 16


def parser() -> argparse.ArgumentParser:
    """The arguments of `sample.py`."""
    p = OneLineParser(prog="sample.py", description="Sample images from a saved model into a folder.")
    p.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="bundled name, model folder, training run, checkpoint, published file, or hf:owner/name on the Hub",
    )
    add_import_options(p)
    p.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="class names, or ids where no class has that name; cycled up to --num; default all",
    )
    p.add_argument("--features", type=Path, metavar="FILE", help="texts from vision_ar.data.text_features, not labels")
    p.add_argument("--num", type=int, help="number of images (default 16, or one for every text)")
    add_sampling_options(p)
    p.add_argument("--seed", type=int, default=0, help="of image 0; image i has seed + i (default 0)")
    p.add_argument("--batch-size", type=int, default=64, help="images at a time; does not change them (default 64)")
    p.add_argument("--out", type=Path, default=Path("samples"), help="folder to write (default samples)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")
    add_weight_options(p)
    p.add_argument("--previews", action="store_true", help="also write previews.png and previews.gif")
    p.add_argument("--roofline", action="store_true", help="also print how near to the limit of the machine it was")
    p.add_argument("--prefix-from", type=Path, metavar="IMAGE", help="keep the first tokens of this picture")
    p.add_argument("--prefix-tokens", type=int, default=16, help="how many tokens --prefix-from keeps (default 16)")
    return p


def main(args: Sequence[str] | None = None) -> None:
    """Sample as the arguments say; every error of the user is one line and exit code 2."""
    given = parser().parse_args(args)
    try:
        check_writable(given.out)
        published = {"family": given.family, "image_size": given.image_size, "tokenizer": given.tokenizer}
        held = {**weight_options(given), **step_options(given)}
        pipe = load(given.model, pick_device(given.device), **held, **published)
        sample_to_folder(pipe, given)
    except USER_ERRORS as error:
        fail(error)
    except KeyboardInterrupt:
        fail("stopped")


def sample_to_folder(pipe: Pipeline, given: argparse.Namespace) -> None:
    """Sample and write all files, or none."""
    if given.num is not None and given.num < 1:
        raise ValueError(f"num must be at least 1, got {given.num}")
    labels, prompts = conditions(pipe, given)
    given.num = len(labels)
    settings = pipe.settings(**sampling_options(given))
    forced = None
    if given.prefix_from is not None:
        tokenizer = pipe.tokenizer
        if not isinstance(tokenizer, ImageTokenizer):
            raise ValueError(f"prefix-from needs a model of images, got one with a {type(tokenizer).__name__}")
        reference = read_image(given.prefix_from, tokenizer.image_size, tokenizer.channels)
        forced = pipe.keep_prefix(reference, given.prefix_tokens, given.num)
    if given.batch_size >= 1:
        print(pipe.check_batch(min(given.batch_size, given.num), **vars(settings)))
    start = time.perf_counter()
    spent: list[float] = []
    samples = run_with_bar(pipe, labels, given, forced, vars(settings), spent)
    seconds = round(time.perf_counter() - start, 3)
    used = {**vars(settings), **pipe.weights(), "batch_size": given.batch_size}
    if forced is not None:
        used |= {"prefix_from": str(given.prefix_from), "prefix_tokens": given.prefix_tokens}
    report = {"model": {"name": pipe.name, "hash": pipe.digest}, "settings": used, "seconds": seconds}
    asked: list[dict[str, Any]] = [{"prompt": text} for text in prompts] or [
        {"label": label} for label in samples.labels
    ]
    write_folder(given.out, samples, asked, report)
    rate = f"{given.num / seconds:.1f} images/s" if seconds else "at once"
    print(f"{given.num} images in {seconds:.1f} s ({rate}) in {given.out}/, see {given.out / 'grid.png'}")
    if given.roofline:
        print(roofline(pipe, min(given.batch_size, given.num), vars(settings), statistics.median(spent)))


def roofline(pipe: Pipeline, batch_size: int, settings: dict[str, Any], seconds: float) -> str:
    """How near a step came to the time that reading weights and cache takes."""
    limit = token_seconds(pipe.generator, batch_size * (2 if pipe.guided(**settings) else 1), pipe.cache_dtype)
    return (
        f"a step of {batch_size} images took {1e3 * seconds:.2f} ms; reading weights and cache once takes "
        f"{1e3 * limit:.2f} ms here: {limit / seconds:.0%} of the limit"
    )


def run_with_bar(
    pipe: Pipeline,
    labels: list[int] | Condition,
    given: argparse.Namespace,
    forced: Tensor | None,
    settings: dict[str, Any],
    spent: list[float],
) -> Samples:
    """Sample with a progress bar on a terminal; `spent` gets the seconds of every step."""
    total = pipe.tokenizer.spec.seq_len * len(labels)
    with tqdm(total=total, unit="tok", disable=not sys.stderr.isatty()) as bar:
        written, last = {"batch": 0}, [time.perf_counter()]

        def advance(event: Event, rows: int) -> None:
            now = time.perf_counter()
            if event.kind == "tokens":
                spent.append(now - last[0])
                bar.update((event.written - written["batch"]) * rows)
                written["batch"] = event.written
            elif event.kind == "done":
                written["batch"] = 0
            last[0] = now

        batches = pipe.sample_batches(
            labels, given.seed, given.batch_size, forced, given.previews, on_event=advance, **settings
        )
        return Samples.joined(list(batches))


def write_folder(out: Path, samples: Samples, asked: list[dict[str, Any]], report: dict[str, Any]) -> None:
    """Write images, grid, previews and `samples.json` beside the folder first, then move them in."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".unfinished-") as scratch:
        folder, images = Path(scratch), []
        for number, image in enumerate(samples.images):
            name = f"{number:05d}.png"
            to_pil(image).save(folder / name)
            images.append({"file": name, **asked[number], "seed": samples.seeds[number]})
        to_pil(grid(samples.images, columns_for(len(images)))).save(folder / "grid.png")
        if samples.previews is not None:
            save_previews(samples.previews, folder)
        (folder / "samples.json").write_text(json.dumps({"images": images, **report}, indent=1))
        earlier, written = earlier_files(out), sorted(folder.iterdir())
        for file in written:
            os.replace(file, out / file.name)
        for file in set(earlier) - {out / file.name for file in written}:
            file.unlink(missing_ok=True)


def earlier_files(out: Path) -> list[Path]:
    """Files that an earlier run wrote here, by its `samples.json`: they would mix with the new ones."""
    try:
        listed = [entry["file"] for entry in json.loads((out / "samples.json").read_text())["images"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    names = [name for name in listed if isinstance(name, str) and Path(name).name == name]
    return [out / name for name in [*names, "previews.png", "previews.gif"]]


def parse_labels(given: Sequence[str] | None, pipe: Pipeline) -> list[int]:
    """Class ids from ids or names; all classes when none are given."""
    if given is None:
        return list(range(pipe.num_classes))
    names = {name.lower(): label for label, name in enumerate(pipe.class_names)}
    labels = []
    for text in given:
        if text.lower() in names:
            labels.append(names[text.lower()])
            continue
        try:
            labels.append(int(text))
        except ValueError:
            known = ", ".join(pipe.class_names) or f"ids 0 to {pipe.num_classes - 1}"
            raise ValueError(f"labels must be class ids or names ({known}), got {text!r}") from None
    return pipe.check_labels(labels)


def conditions(pipe: Pipeline, given: argparse.Namespace) -> tuple[list[int] | Condition, list[str]]:
    """What the images are of, cycled up to their number, and the texts where there are any."""
    if given.features is None:
        if not pipe.num_classes:
            raise ValueError(
                "features must be given for a model of texts; python -m vision_ar.data.text_features makes them"
            )
        return cycle_labels(parse_labels(given.labels, pipe), given.num or DEFAULT_NUM), []
    if given.labels is not None:
        raise ValueError("labels must be left out with features")
    texts = TextFeatures.read(given.features)
    rows = cycle_labels(list(range(len(texts.prompts))), given.num or len(texts.prompts))
    return Condition(cond=texts.features[rows], cond_mask=texts.mask[rows]), [texts.prompts[row] for row in rows]


def cycle_labels(labels: list[int], count: int) -> list[int]:
    """Repeat the labels in order up to `count`."""
    return [labels[i % len(labels)] for i in range(count)]
