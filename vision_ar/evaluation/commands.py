"""The commands of `python -m vision_ar.evaluation`.

    generate-and-score --model M --protocol P --data DIR --out DIR    sample, score, save
    sweep --cfg-scale 1 1.5 2 3 4 ...                                 the same for several strengths: table and curve
    score --images DIR|NPZ --reference ... --protocol P --out FILE    score finished images
    reconstruct --model M --protocol P --data DIR --out DIR           a tokenizer: PSNR, SSIM, rFID, codebook
    likelihood --model M --protocol P --data DIR --out DIR            bits of the tokens of held-out images
    make-reference --data DIR --protocol P --out FILE.npz             read a set once
    protocols                                                         what each one fixes

Everything finished stays in --out: the same command goes on after an interruption. Under torchrun the processes share
the work; the result is that of one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vision_ar.checkpoints.store import load_model
from vision_ar.command_line import USER_ERRORS, OneLineParser, fail
from vision_ar.evaluation import protocols
from vision_ar.evaluation.harness import Harness
from vision_ar.evaluation.image_files import write_npz
from vision_ar.evaluation.likelihood import LikelihoodStore
from vision_ar.evaluation.processes import Processes
from vision_ar.evaluation.reconstruction import ReconstructionStore
from vision_ar.evaluation.references import DataPixels, checked_images, known_as, open_data
from vision_ar.evaluation.samples import SampleStore, shown
from vision_ar.evaluation.scoring import Result, score, stamp, stamp_of
from vision_ar.evaluation.statistics import save_statistics
from vision_ar.evaluation.sweeps import write_sweep
from vision_ar.interfaces import ImageTokenizer
from vision_ar.pictures import columns_for, grid, to_pil
from vision_ar.pipeline import Settings, load, spread_seeds
from vision_ar.sampling_options import (
    add_sampling_options,
    add_weight_options,
    sampling_options,
    step_options,
    weight_options,
)

RESULT = "result.json"


def generate_and_score(given: argparse.Namespace) -> Result:
    """Sample what a protocol asks, score it, save all."""
    out = Path(given.out)
    harness = Harness(given, out, "generation")
    protocol = harness.protocol
    count = protocol.num_samples if given.num is None else given.num
    partial = harness.check_count(count)
    pipe = load(given.model, harness.device, **weight_options(given), **step_options(given))
    settings = vars(pipe.settings(**sampling_options(given)))
    spread_seeds(given.seed, count)  # they must fit
    store = SampleStore(out / "samples", pipe, protocol, settings, given.seed, count, given.batch_size)
    reference = harness.reference()  # before hours of sampling, so that a wrong one is met at once
    harness.fill(store, "samples")
    features = harness.features("features", store.pixels())
    own_classes = len(harness.extractor.class_names) == pipe.num_classes
    scores = score(features, reference, protocol.metrics, store.labels if own_classes else None)
    left_out = [metric for metric in protocol.metrics if metric == "accuracy" and not own_classes]
    model = {"name": pipe.name, "hash": pipe.digest}
    used: dict[str, Any] = {"settings": {**settings, **pipe.weights()}, "seed": given.seed, "left_out": left_out}
    used["tokenizer"] = pipe.tokenizer.init_args
    if harness.processes.first:
        to_pil(grid(shown(features.pixels), columns_for(min(64, count)))).save(out / "grid.png")
        if given.npz:
            write_npz(out / "samples.npz", features.pixels.batches(250), count)
    return harness.conclude(out / RESULT, partial, scores, stamp_of(features, reference, model=model, **used))


def sweep(given: argparse.Namespace) -> None:
    """Score a model at several guidance strengths; a table and, with matplotlib, curves."""
    folders = {f"cfg_{scale:g}": scale for scale in given.cfg_scale}
    if len(folders) < len(given.cfg_scale):
        raise ValueError(f"cfg-scale must be different strengths, got {' '.join(f'{s:g}' for s in given.cfg_scale)}")
    for scale in given.cfg_scale:
        Settings(cfg_scale=scale).schedule()  # all are checked before the first is sampled
    results, shared = {}, {**vars(given), "reference_folder": Path(given.out) / "reference"}
    for folder, scale in folders.items():
        one = argparse.Namespace(**{**shared, "cfg_scale": scale, "out": str(Path(given.out) / folder)})
        results[scale] = generate_and_score(one)
    if Processes.join().first:
        print(write_sweep(results, Path(given.out)))


def score_images(given: argparse.Namespace) -> None:
    """Score finished images."""
    path = Path(given.out)
    if path.suffix != ".json":
        raise ValueError(f"out must end with .json, got {path}")
    harness = Harness(given, path.with_suffix(""), "generation")
    pixels = checked_images(given.images, harness.protocol)
    partial = harness.check_count(pixels.count)
    reference = harness.reference()
    features = harness.features("features", pixels)
    scores = score(features, reference, harness.protocol.metrics)
    left_out = [metric for metric in harness.protocol.metrics if metric == "accuracy"]  # images come without classes
    stamped = stamp_of(features, reference, lossy_files=pixels.lossy, left_out=left_out)
    harness.conclude(path, partial, scores, stamped)


def reconstruct(given: argparse.Namespace) -> None:
    """Encode and decode a set, compare it with itself."""
    out = Path(given.out)
    harness = Harness(given, out, "reconstruction")
    protocol = harness.protocol
    saved = load_model(given.model)
    tokenizer: Any = saved.tokenizer.to(harness.device).eval()
    originals = given_images(given, protocol, tokenizer, saved.name)
    partial = harness.check_count(originals.count)
    store = ReconstructionStore(
        out / "reconstructions", tokenizer, saved.digest, originals, protocol, given.lpips, given.batch_size
    )
    reference = harness.features("reference", originals)
    harness.fill(store, "reconstructions")
    features = harness.features("features", store.pixels())
    known = None if partial else known_as(protocol, originals.name, reference.digest())
    statistics = reference.statistics(known_as=known)
    found = score(features, statistics, protocol.metrics)
    if "fid" in found:
        found = {"rfid": found.pop("fid"), **found}  # what a distance of reconstructions is called
    scores = {**store.scores(), **found}
    if harness.processes.first:
        pairs = torch.stack([shown(originals, 32), shown(features.pixels, 32)], dim=1)
        to_pil(grid(pairs.flatten(0, 1), 8)).save(out / "grid.png")
    model = {"name": saved.name, "hash": saved.digest}
    used = {"model": model, "tokenizer": saved.tokenizer.init_args}
    harness.conclude(out / RESULT, partial, scores, stamp_of(features, statistics, **used))


def likelihood(given: argparse.Namespace) -> None:
    """Measure how likely a model holds the tokens of held-out images."""
    out = Path(given.out)
    harness = Harness(given, out, "likelihood")
    protocol = harness.protocol
    pipe = load(given.model, harness.device, **weight_options(given))
    originals = given_images(given, protocol, pipe.tokenizer, pipe.name)
    partial = harness.check_count(originals.count)
    store = LikelihoodStore(out / "likelihood", pipe, originals, protocol, given.batch_size)
    harness.fill(store, "likelihood")
    digest = store.digest()
    known = None if partial else known_as(protocol, originals.name, digest)
    about = {"name": originals.name, "digest": digest, "known_as": known}
    model = {"name": pipe.name, "hash": pipe.digest}
    used = {"model": model, "settings": pipe.weights()}
    harness.conclude(out / RESULT, partial, store.scores(), stamp(originals.count, digest, about, **used))


def given_images(given: argparse.Namespace, protocol: protocols.Protocol, tokenizer: Any, model: str) -> DataPixels:
    """The images of a protocol that a tokenizer is to read, at most --num of them.

    Raises:
        ValueError: if there are none, or the tokenizer reads others.
    """
    if given.data is None:
        raise ValueError(f"data must be given for protocol {protocol.name}: {protocol.reference}")
    if not isinstance(tokenizer, ImageTokenizer) or tokenizer.image_size != protocol.image_size:
        raise ValueError(f"model must have a tokenizer of {protocol.image_size} pixel images, got {model}")
    originals = DataPixels(open_data(given.data, protocol.image_size, tokenizer.channels), protocol.split)
    if given.num is not None:
        originals.count = min(originals.count, given.num)
    return originals


def make_reference(given: argparse.Namespace) -> None:
    """Read a set of images once and keep its statistics and features."""
    path = Path(given.out)
    if path.suffix != ".npz":
        raise ValueError(f"out must end with .npz, got {path}")
    harness = Harness(given, path.with_suffix(""))
    if given.images is not None and given.data is not None:
        raise ValueError("images must be left out beside data: only one of them can be read")
    if given.images is not None:
        pixels: Any = checked_images(given.images, harness.protocol)
    elif given.data is not None:
        data = open_data(given.data, harness.protocol.image_size, harness.protocol.channels)
        pixels = DataPixels(data, given.split or harness.protocol.split)
    else:
        raise ValueError("data or images must be given, got neither")
    found = harness.features("features", pixels).statistics()
    if harness.processes.first:
        save_statistics(path, found.moments, found.spatial, found.features, found.about)
        print(f"{pixels.count} images, digest {found.digest}, extractor {harness.extractor.name}, saved in {path}")


def list_protocols(given: argparse.Namespace) -> None:
    """Print what every protocol fixes."""
    for protocol in protocols.PROTOCOLS.values():
        facts = [f"{name} {value}" for name, value in asdict(protocol).items() if name not in ("name", "channels")]
        print(f"{protocol.name}\n    " + "\n    ".join(facts))


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    p = OneLineParser(prog="python -m vision_ar.evaluation", description=__doc__.split("\n")[0])
    commands = p.add_subparsers(dest="command", required=True, parser_class=OneLineParser)
    add_command(commands, "protocols", list_protocols)
    for name, action in (("generate-and-score", generate_and_score), ("sweep", sweep)):
        one = add_command(commands, name, action)
        add_protocol(one, "extractor", "reference", "num", "partial")
        one.add_argument("--model", required=True, help="bundled name, model folder, training run or checkpoint")
        one.add_argument("--out", required=True, help="folder to write")
        add_sampling_options(one)
        one.add_argument("--seed", type=int, default=0, help="of sample 0; sample i has seed + i (default 0)")
        add_weight_options(one)
        one.add_argument("--npz", action="store_true", help="also write samples.npz as the ADM evaluator reads it")
        if action is sweep:
            options = {option.dest: option for option in one._actions}
            options["cfg_scale"].nargs, options["cfg_scale"].required = "+", True
    one = add_command(commands, "score", score_images)
    add_protocol(one, "extractor", "reference", "partial")
    one.add_argument("--images", required=True, help="folder of images, .npz in the ADM layout, or .npy")
    one.add_argument("--out", required=True, help="JSON file to write; features are kept in a folder of that name")
    one = add_command(commands, "reconstruct", reconstruct)
    add_protocol(one, "extractor", "num", "partial")
    one.add_argument("--model", required=True, help="bundled name, model folder, training run or checkpoint")
    one.add_argument("--out", required=True, help="folder to write")
    one.add_argument("--lpips", action="store_true", help="also LPIPS; needs VGG weights")
    one = add_command(commands, "likelihood", likelihood)
    add_protocol(one, "num", "partial")
    one.add_argument("--model", required=True, help="bundled name, model folder, training run or checkpoint")
    one.add_argument("--out", required=True, help="folder to write")
    add_weight_options(one)
    one = add_command(commands, "make-reference", make_reference)
    add_protocol(one, "extractor")
    one.add_argument("--images", help="folder, .npz or .npy of images, in place of --data")
    one.add_argument("--split", choices=["train", "val"], help="of --data (default: that of the protocol)")
    one.add_argument("--out", required=True, help=".npz to write")
    return p


def add_command(commands: Any, name: str, action: Callable[[argparse.Namespace], Any]) -> argparse.ArgumentParser:
    """A command whose help is the first line of its function."""
    text = (action.__doc__ or "").split("\n")[0]
    one = commands.add_parser(name, help=text, description=text)
    one.set_defaults(action=action)
    return one


def add_protocol(p: argparse.ArgumentParser, *also: str) -> None:
    """Options of every command that follows a protocol, and those of the names in `also`."""
    p.add_argument("--protocol", required=True, help="see the command protocols")
    if "extractor" in also:
        p.add_argument("--extractor", help="another one than the protocol's; the result says so in its protocol's name")
        p.add_argument("--weights", help="Inception weights, .pth or .safetensors")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")
    p.add_argument("--data", help="digits, folder of Parquet files or class folders, or YAML with a data section")
    if "reference" in also:
        p.add_argument("--reference", help="statistics file, or folder, .npz or .npy of images, in place of --data")
        p.add_argument("--reference-hash", metavar="DIGEST", help="refuse any other reference")
    if "num" in also:
        p.add_argument("--num", type=int, help="images (default: all that the protocol asks)")
        p.add_argument("--batch-size", type=int, default=100, help="images at a time (default 100)")
    if "partial" in also:
        p.add_argument("--allow-partial", action="store_true", help="score another number of images, marked so")


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; every error of the user is one line and exit code 2."""
    given = parser().parse_args(args)
    try:
        given.action(given)
    except USER_ERRORS as error:
        fail(error)
    except KeyboardInterrupt:
        fail("stopped; the same command goes on")
    finally:
        Processes.leave()
