"""What previews cost: python -m benchmarks.sampler_previews [--model cifar10-dar] [--batch 1 16 64]

Seconds of a batch with a preview after every group, against the same batch decoded once at its end, in turn; the best
of `--rounds` counts. The share is what previews add.
"""

from __future__ import annotations

import argparse
import time

import torch

from vision_ar.command_line import USER_ERRORS, OneLineParser, fail
from vision_ar.pipeline import Pipeline, load
from vision_ar.sampler.limit import wait


def seconds(pipe: Pipeline, batch: int, seed: int, previews: bool) -> float:
    """Of one batch, with its pictures."""
    labels = [number % pipe.num_classes for number in range(batch)]
    start = time.perf_counter()
    pipe.sample(labels, seed=seed, batch_size=batch, previews=previews)
    wait(pipe.device)
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    p = OneLineParser(prog="python -m benchmarks.sampler_previews", description=__doc__.split("\n")[0])
    p.add_argument("--model", default="cifar10-dar", help="bundled name, model folder or checkpoint")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64], help="images at a time")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--rounds", type=int, default=4)
    given: argparse.Namespace = p.parse_args()
    try:
        pipe = load(given.model, given.device)
    except USER_ERRORS as error:
        fail(error)
    print(f"{pipe.name}, {given.device}, {torch.get_num_threads()} threads")
    print("batch   without (s)   with previews (s)    share")
    for batch in given.batch:
        both = [[seconds(pipe, batch, seed, previews) for previews in (False, True)] for seed in range(given.rounds)]
        without, shown = (min(times) for times in zip(*both, strict=True))
        print(f"{batch:5d}   {without:11.3f}   {shown:17.3f}   {shown / without - 1:6.1%}", flush=True)


if __name__ == "__main__":
    main()
