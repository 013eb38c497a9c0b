"""How the cost of sampling grows: python -m benchmarks.sampler_growth --out docs/sampler_growth.png

Tokens a second of one model with guidance, against images at a time (sequences of --seq-len) and against the length of
the sequence (one image at a time). Random weights; every point is the better of two batches. Also prints the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.sampler_speed import ours
from vision_ar.backbones.llama import PRESETS
from vision_ar.command_line import OneLineParser
from vision_ar.layers.packed import packs

BATCHES, LENGTHS = (1, 2, 4, 8, 16, 32, 64), (256, 512, 1024, 2048, 4096)


def tokens_per_second(given: argparse.Namespace, batch: int, seq_len: int) -> float:
    """Of all images together."""
    dtype = getattr(torch, given.dtype)
    steps = ours(given.size, batch, seq_len, dtype, given.device, "ours")
    return batch * seq_len / min(sum(steps()) for _ in range(2))


def main() -> None:
    """Print the table and draw the curves."""
    p = OneLineParser(prog="python -m benchmarks.sampler_growth", description=__doc__.split("\n")[0])
    p.add_argument("--size", choices=PRESETS, default="B")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() or packs(torch.bfloat16) else "float32")
    p.add_argument("--seq-len", type=int, default=256, help="tokens of an image where the batch grows")
    p.add_argument("--out", type=Path, help="picture to write")
    given = p.parse_args()
    print(f"{given.size}, {given.dtype}, {given.device}, {torch.get_num_threads()} threads, guidance on")
    print("batch   tokens   tokens/s", flush=True)
    found = {}
    for batch, seq_len in [*((batch, given.seq_len) for batch in BATCHES), *((1, length) for length in LENGTHS)]:
        if (batch, seq_len) not in found:
            found[batch, seq_len] = tokens_per_second(given, batch, seq_len)
            print(f"{batch:5d}   {seq_len:6d}   {found[batch, seq_len]:8.1f}", flush=True)
    if given.out:
        draw(given, found)


def draw(given: argparse.Namespace, found: dict[tuple[int, int], float]) -> None:
    """Two curves side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(BATCHES, [found[batch, given.seq_len] for batch in BATCHES], marker="o")
    left.set_xlabel(f"images at a time, {given.seq_len} tokens each")
    right.plot(LENGTHS, [found[1, length] for length in LENGTHS], marker="o")
    right.set_xlabel("tokens of one image")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("tokens/s")
        axes.grid(alpha=0.3)
    threads = f", {torch.get_num_threads()} threads" if given.device == "cpu" else ""
    figure.suptitle(f"{given.size}, {given.dtype}, {given.device}{threads}, with guidance")
    figure.savefig(given.out, dpi=120)


if __name__ == "__main__":
    main()
