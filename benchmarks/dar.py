"""The claims of D-AR at small scale, as tables: what each token group adds, and that the order of the groups matters.

    python benchmarks/dar.py previews --data DIR                fd-cifar10 of samples from 1/4, 1/2, 3/4, all tokens
    python benchmarks/dar.py order --data DIR --models A B ...  fd-cifar10 and class accuracy of several models
    python benchmarks/dar.py pictures --out docs                the pictures of the README
    python benchmarks/dar.py naming --out DIR                   the same grid, its rows shuffled, their classes apart,
                                                                for someone who is to name the classes

DIR is a folder of images in Parquet, CIFAR-10 by default. Distances use the in-domain features of --extractor and
compare runs with each other only. What each group adds to a reconstruction is a table of the package:

    python -m vision_ar.evaluation reconstruct --model cifar10-dar --protocol recon-cifar10 --data DIR --out OUT
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import vision_ar
from vision_ar.data.images import Parquet
from vision_ar.evaluation.extractors import Extractor, load_extractor
from vision_ar.evaluation.frechet import RunningMoments, frechet_distance
from vision_ar.evaluation.likelihood import token_nats
from vision_ar.interfaces import ImageTokenizer
from vision_ar.pictures import grid, save_gif, to_pil, to_pixels
from vision_ar.pipeline import Pipeline, Samples
from vision_ar.tokenizers.diffusion import DiffusionTokenizer, FlowConfig

BATCH = 250


def held_out_images(data: str, pipe: Pipeline, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images and labels of the test set, at most `count`."""
    size, channels = image_size(pipe)
    module = Parquet(root=data, image_size=size, channels=channels, batch_size=BATCH)
    module.setup("validate")
    seen = 0
    for batch in module.val_dataloader():
        if seen >= count:
            return
        seen += len(batch["labels"])
        yield batch["images"], batch["labels"]


def image_size(pipe: Pipeline) -> tuple[int, Literal[1, 3]]:
    """Side and channels of the images of a model."""
    assert isinstance(pipe.tokenizer, ImageTokenizer)
    return pipe.tokenizer.image_size, 3 if pipe.tokenizer.channels == 3 else 1


def judge(images: Tensor, extractor: Extractor) -> tuple[RunningMoments, Tensor]:
    """Feature moments of images in [-1, 1], rounded to pixels as saved pictures are, and the guessed class of each."""
    running, guesses = RunningMoments(extractor.feature_dim), []
    for part in to_pixels(images).split(BATCH):
        found = extractor(part)
        running.update(found.features)
        guesses.append(found.logits.argmax(-1))
    return running, torch.cat(guesses)


def reference(data: str, pipe: Pipeline, extractor: Extractor) -> RunningMoments:
    """Feature moments of the test set."""
    running = RunningMoments(extractor.feature_dim)
    for images, _ in held_out_images(data, pipe, 10**9):
        running.update(extractor(to_pixels(images)).features)
    return running


def draw(pipe: Pipeline, count: int, previews: bool, **settings: float | str) -> tuple[Tensor, Tensor | None, Tensor]:
    """Images, previews and labels of `count` samples, classes in turn, seeds 0, 1, 2, ..."""
    labels = [i % pipe.num_classes for i in range(count)]
    samples = pipe.sample(labels, seed=0, batch_size=BATCH, previews=previews, **settings)
    return samples.images, samples.previews, torch.tensor(labels)


def previews(given: argparse.Namespace) -> None:
    """Print the distance of previews to the data after each quarter of the tokens."""
    extractor, pipe = load_extractor(given.extractor), open_model(given.model, given.flow)
    images, shown, labels = draw(pipe, given.num, True, **settings_of(given))
    assert shown is not None
    data = reference(given.data, pipe, extractor)
    groups = shown.shape[1]
    settings = settings_of(given) | given.flow or "default settings"
    print(f"{given.num} samples of {given.model}, {settings}, against the test set")
    print(f"tokens   {extractor.score_name}   class accuracy")
    for quarter in range(1, 5):
        frame = shown[:, quarter * groups // 4 - 1]
        found, guesses = judge(frame, extractor)
        distance = frechet_distance(found, data)
        end = pipe.tokenizer.spec.ends[quarter * groups // 4 - 1]
        print(f"{end:6d}   {distance:10.3f}   {float((guesses == labels).float().mean()):14.1%}")


def nats_per_image(pipe: Pipeline, data: str, count: int) -> float:
    """Negative log-likelihood of all tokens of a test image given its class, whatever their order."""
    batches = held_out_images(data, pipe, count)
    nats = [token_nats(pipe.generator, pipe.tokenizer.encode(images, labels)).sum(dim=1) for images, labels in batches]
    return float(torch.cat(nats).mean())


def order(given: argparse.Namespace) -> None:
    """Print likelihood and the distance of several models' samples, with and without guidance."""
    extractor = load_extractor(given.extractor)
    data = reference(given.data, open_model(given.models[0], {}), extractor)
    print(f"{given.num} samples a row against the test set, classes in turn, seeds 0, 1, 2, ...")
    print(f"model   cfg_scale   {extractor.score_name}   class accuracy   images/s")
    for name in given.models:
        pipe = open_model(name, given.flow)
        print(f"{name}   {nats_per_image(pipe, given.data, given.num):.2f} nats a test image")
        for scale in given.scales:
            start = time.perf_counter()
            images, _, labels = draw(pipe, given.num, False, **{**settings_of(given), "cfg_scale": scale})
            rate = given.num / (time.perf_counter() - start)
            found, guesses = judge(images, extractor)
            accuracy = float((guesses == labels).float().mean())
            print(f"{name}   {scale:g}   {frechet_distance(found, data):.3f}   {accuracy:.1%}   {rate:.1f}", flush=True)


def grid_samples(pipe: Pipeline, previews: bool, given: argparse.Namespace) -> Samples:
    """Eight samples of every class, class by class."""
    labels = [label for label in range(pipe.num_classes) for _ in range(8)]
    return pipe.sample(labels, seed=0, previews=previews, **settings_of(given))


def naming(given: argparse.Namespace) -> None:
    """Write the grid with its rows in a random order, and that order apart."""
    out, pipe = Path(given.out), open_model(given.model, given.flow)
    images = grid_samples(pipe, False, given).images.unflatten(0, (pipe.num_classes, 8))
    order = random.sample(range(pipe.num_classes), pipe.num_classes)  # torch would draw the same order in every process
    to_pil(grid(images[order].flatten(0, 1), 8)).save(out / "naming.png")
    names = pipe.class_names or [str(label) for label in range(pipe.num_classes)]
    (out / "naming.json").write_text(json.dumps([names[row] for row in order]))
    print(f"wrote naming.png, and the classes of its rows to naming.json, in {out}")


def pictures(given: argparse.Namespace) -> None:
    """Write the README's pictures: a grid of classes x 8 samples, and previews of one sample a class."""
    out, pipe = Path(given.out), open_model(given.model, given.flow)
    samples = grid_samples(pipe, True, given)
    assert samples.previews is not None
    to_pil(grid(samples.images, 8)).save(out / "cifar10_grid.png")
    firsts = samples.previews[::8]
    to_pil(grid(firsts.flatten(0, 1), firsts.shape[1])).save(out / "cifar10_previews.png")
    save_gif([grid(frame, 8) for frame in samples.previews.unbind(1)], out / "cifar10_previews.gif")
    print(f"wrote cifar10_grid.png, cifar10_previews.png and cifar10_previews.gif in {out}")


def open_model(name: str, flow: dict[str, Any]) -> Pipeline:
    """A model whose decoding has the settings `flow`, the others are its own."""
    pipe = vision_ar.load(name)
    assert isinstance(pipe.tokenizer, DiffusionTokenizer)
    pipe.tokenizer.flow = replace(pipe.tokenizer.flow, **flow)
    return pipe


def flow_settings(text: str) -> dict[str, Any]:
    """Decoding settings from JSON; argparse shows what is wrong with them."""
    try:
        settings = json.loads(text)
        replace(FlowConfig(), **settings)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"must be JSON of fields of FlowConfig, got {text}: {error}") from error
    return settings


def settings_of(given: argparse.Namespace) -> dict[str, float | str]:
    """Sampling settings that were given; the model's own defaults stand for the others."""
    names = ("cfg_scale", "cfg_schedule", "temperature", "top_p")
    return {name: getattr(given, name) for name in names if getattr(given, name) is not None}


@torch.inference_mode()
def main() -> None:
    """Parse and run one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = (previews, order, pictures, naming)
    commands = {table.__name__: table for table in tables}
    parser.add_argument("table", choices=commands)
    parser.add_argument("--data", default="data/cifar10", help="folder of the images in Parquet")
    parser.add_argument("--model", default="cifar10-dar")
    parser.add_argument("--models", nargs="+", default=["cifar10-dar"])
    parser.add_argument("--extractor", default="cifar10", help="whose features judge, or a classifier's .safetensors")
    parser.add_argument("--num", type=int, default=10000, help="images or samples")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--cfg-scale", type=float)
    parser.add_argument("--cfg-schedule")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument(
        "--flow", type=flow_settings, default={}, help='decoding, as {"noise_scale": 1, "num_steps": 8}'
    )
    parser.add_argument("--out", default="docs")
    given = parser.parse_args()
    commands[given.table](given)


if __name__ == "__main__":
    main()
