"""How fast tokens are written, side by side: python -m benchmarks.sampler_speed [--size B] [--batch 1 8] [--out FILE]

Rows, all of one size, with guidance (two rows an image) and random weights:

    plain          a loop in the manner of the published code: key-value buffers of full length, masked scores of all
                   slots, separate gate and up weights, one product of float32 logits
    transformers   `generate` of transformers' Llama on twice the batch with its static cache, without guidance
    ours           `Session` as `vision_ar.load` prepares it; on a GPU a CUDA graph over the step
    ours eager     the same without the graph (GPU)
    ours compiled  the step taken by `torch.compile`
    ours int8      with weights of 8 bits
    ours float8    likewise, as floating-point numbers (GPU)
    ours cache8    with keys and values of 8 bits and the compiled step (GPU), for many images

Everything that the project promises for a GPU is measured by one command there:

    python -m benchmarks.sampler_speed --plan gpu --out FILE

Every row is a process of its own, so that its peak memory is its own; the rows run one after the other, `--rounds`
times in turn, and the best round counts. The limit is the time to read weights and cache once a token at the bandwidth
that this machine shows on as many bytes. tokens/s are those of all images together.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_ar.backbones.llama import PRESETS, Llama, LlamaSize
from vision_ar.command_line import OneLineParser
from vision_ar.generator import Generator
from vision_ar.interfaces import TokenSpec
from vision_ar.layers.mlp import swiglu_width
from vision_ar.layers.packed import pack, packs
from vision_ar.objectives.next_token import NextToken
from vision_ar.pipeline import CACHE_DTYPES
from vision_ar.sampler.engine import Condition, Session
from vision_ar.sampler.guidance import constant
from vision_ar.sampler.limit import bandwidth, wait, weight_bytes
from vision_ar.sampler.logits import Law
from vision_ar.sampler.pool import SessionPool

VOCAB, CFG_SCALE = 16384, 4.0
ROWS = (
    "plain", "transformers", "ours", "ours eager", "ours compiled", "ours int8", "ours float8", "ours cache8"
)  # fmt: skip
USUAL = {"cpu": ("plain", "transformers", "ours", "ours int8"), "cuda": ROWS}
"""Rows that are measured unless others are named."""
SHORT = ("ours int8", "ours float8", "ours cache8")
"""Rows with parts of 8 bits: the rest is in the shortest dtype."""
PLANS = {"gpu": [("B", [1, 64]), ("L", [1, 256]), ("XL", [1, 16])]}
"""Sizes and batches that are measured together, in the shortest dtype."""
Steps = Callable[[], list[float]]
"""Writes one batch of images and returns the seconds of every token."""


def make_generator(size: str, seq_len: int, dtype: torch.dtype, device: str) -> Generator:
    """A generator with the shapes of LlamaGen and random weights."""
    torch.manual_seed(0)
    spec = TokenSpec(seq_len, (seq_len,), vocab_size=VOCAB)
    with torch.device(device):
        generator = Generator(spec, lambda s: Llama(s, LlamaSize(size), num_classes=1000), NextToken())
        torch.nn.init.normal_(generator.heads["token"].output.weight, std=0.02)  # type: ignore[union-attr, arg-type]
    return generator.to(dtype).eval()


def ours(size: str, batch: int, seq_len: int, dtype: torch.dtype, device: str, row: str) -> Steps:
    """This project's sampler."""
    generator = make_generator(size, seq_len, dtype, device)
    compiled, cache_dtype = row in ("ours compiled", "ours cache8"), None
    if row == "ours cache8":
        cache_dtype = CACHE_DTYPES["float8"]
    if not compiled:  # the compiler lays weights out itself
        pack(generator, {"ours int8": "int8", "ours float8": "float8"}.get(row))
    pool = SessionPool(generator, compiled, cache_dtype)  # what was captured serves the next batch

    def steps() -> list[float]:
        asked = (Condition(labels=torch.arange(batch) % 1000), torch.arange(batch), Law(), constant(CFG_SCALE), None)
        if row == "ours eager":
            session = Session(generator, *asked[:4], fixed=False)
        else:
            session = pool.open(*asked)
        seconds = []
        while not session.done:
            start = time.perf_counter()
            session.step()
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        wait(device)  # once: a GPU is told what to do faster than it does it
        seconds[-1] += time.perf_counter() - start
        pool.give_back(session, *asked)
        return seconds

    return steps


def plain(size: str, batch: int, seq_len: int, dtype: torch.dtype, device: str, row: str) -> Steps:
    """What published samplers do, with the shapes of the same model."""
    dim, depth, heads = PRESETS[size]
    width, hidden, slots, rows = dim // heads, swiglu_width(dim), seq_len + 1, 2 * batch
    torch.manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return (0.02 * torch.randn(*shape, device=device)).to(dtype)

    layers = [
        {
            "qkv": weight(3 * dim, dim), "out": weight(dim, dim), "down": weight(dim, hidden),
            "gate": weight(hidden, dim), "up": weight(hidden, dim),
            "norm_1": torch.ones(dim, device=device, dtype=dtype),
            "norm_2": torch.ones(dim, device=device, dtype=dtype),
        }
        for _ in range(depth)
    ]  # fmt: skip
    table, head, last = weight(VOCAB, dim), weight(VOCAB, dim), torch.ones(dim, device=device, dtype=dtype)
    turns = torch.polar(
        torch.ones(slots, width // 2), torch.outer(torch.arange(slots), 1e4 ** -(torch.arange(0, width, 2) / width))
    ).to(device)
    causal = torch.ones(slots, slots, dtype=torch.bool, device=device).tril()

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * gain

    def turned(x: Tensor, at: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns[at][None, :, None]).flatten(-2).to(x.dtype)

    @torch.inference_mode()
    def steps() -> list[float]:
        shape = (rows, heads, slots, width)
        caches = [[torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)] for _ in range(depth)]
        ids, seconds = torch.zeros(rows, 1, dtype=torch.int64, device=device), []
        for t in range(seq_len):
            start, at = time.perf_counter(), torch.tensor([t], device=device)
            x, mask = table[ids], causal[None, None, at]
            for layer, cache in zip(layers, caches, strict=True):
                parts = F.linear(norm(x, layer["norm_1"]), layer["qkv"]).split(dim, dim=-1)
                query, key, value = (part.view(rows, 1, heads, width) for part in parts)
                query, key, value = (part.transpose(1, 2) for part in (turned(query, at), turned(key, at), value))
                cache[0][:, :, at], cache[1][:, :, at] = key, value
                scores = query @ cache[0].transpose(-2, -1) / width**0.5
                probs = scores.masked_fill(~mask, -torch.inf).float().softmax(-1).to(dtype)
                x = x + F.linear((probs @ cache[1]).transpose(1, 2).reshape(rows, 1, dim), layer["out"])
                y = norm(x, layer["norm_2"])
                x = x + F.linear(F.silu(F.linear(y, layer["gate"])) * F.linear(y, layer["up"]), layer["down"])
            logits = F.linear(norm(x, last), head)[:, -1].float()
            cond, uncond = logits.chunk(2)
            probs = (uncond + CFG_SCALE * (cond - uncond)).softmax(-1)
            ids = torch.multinomial(probs, 1).repeat(2, 1)
            wait(device)
            seconds.append(time.perf_counter() - start)
        return seconds

    return steps


def transformers_generate(size: str, batch: int, seq_len: int, dtype: torch.dtype, device: str, row: str) -> Steps:
    """The generation loop of transformers; it is timed as a whole."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, logging

    logging.set_verbosity_error()
    dim, depth, heads = PRESETS[size]
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=dim, intermediate_size=swiglu_width(dim), num_hidden_layers=depth,
        num_attention_heads=heads, max_position_embeddings=seq_len + 1, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(device, dtype).eval()
    settings = GenerationConfig(
        max_new_tokens=seq_len, min_new_tokens=seq_len, do_sample=True, top_k=0, cache_implementation="static",
        pad_token_id=0, bos_token_id=0,
    )  # fmt: skip
    start_ids = torch.zeros(2 * batch, 1, dtype=torch.int64, device=device)

    def steps() -> list[float]:
        start = time.perf_counter()
        model.generate(start_ids, attention_mask=torch.ones_like(start_ids), generation_config=settings)
        wait(device)
        return [(time.perf_counter() - start) / seq_len] * seq_len

    return steps


def peak_bytes(device: str) -> int:
    """Most memory that this process ever held: of the GPU, else resident (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def least_bytes(size: str, batch: int, seq_len: int, dtype: str, row: str) -> float:
    """Bytes that a token reads at least: all weights, and on average half of the cache."""
    generator = make_generator(size, seq_len, getattr(torch, dtype), "meta")
    width = generator.backbone.norm.weight.element_size()
    weights = weight_bytes(generator) / (width if row in ("ours int8", "ours float8") else 1)
    cache = generator.backbone.new_cache(1).full_bytes / (width if row == "ours cache8" else 1)
    return weights + 2 * batch * cache / 2


def measure(given: argparse.Namespace) -> None:
    """One row in this process: a line of JSON."""
    dtype = getattr(torch, given.dtype)
    kinds: dict[str, Any] = {"plain": plain, "transformers": transformers_generate}
    make = kinds.get(given.row, ours)
    steps = make(given.size, given.batch[0], given.seq_len, dtype, given.device, given.row)
    start = time.perf_counter()
    steps()[0]
    warm_up = time.perf_counter() - start
    seconds = [sum(steps()) for _ in range(given.repeats)]
    found = {"seconds": min(seconds), "warm_up": warm_up - statistics.median(seconds), "peak": peak_bytes(given.device)}
    print(json.dumps(found))


def run_row(given: argparse.Namespace, size: str, row: str, dtype: str, batch: int) -> dict[str, float]:
    """Measure a row in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.sampler_speed", "--row", row, "--size", size, "--dtype", dtype]
    command += ["--batch", str(batch), "--seq-len", str(given.seq_len), "--device", given.device]
    command += ["--repeats", str(given.repeats)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{row} must run, got: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def rows_of(given: argparse.Namespace) -> list[tuple[str, str]]:
    """Rows and dtypes that this machine has."""
    dtypes = ["float32"] + ["bfloat16"] * (given.device == "cuda" or packs(torch.bfloat16))
    dtypes = dtypes[-1:] if given.plan else dtypes
    pairs = [(row, dtype) for row in given.rows or USUAL[given.device] for dtype in dtypes]
    return [(row, dtype) for row, dtype in pairs if row not in SHORT or dtype == dtypes[-1]]


def compare(given: argparse.Namespace, size: str, batch: int) -> tuple[list[dict[str, Any]], float]:
    """Measure all rows for one size and batch; also the bytes a second that reading reached."""
    best: dict[tuple[str, str], dict[str, float]] = {}
    reached = 0.0
    for _ in range(given.rounds):
        reached = max(reached, bandwidth(least_bytes(size, 1, given.seq_len, "float32", "plain"), given.device))
        for row, dtype in rows_of(given):
            found = run_row(given, size, row, dtype, batch)
            if (row, dtype) not in best or found["seconds"] < best[row, dtype]["seconds"]:
                best[row, dtype] = found
    table = []
    for (row, dtype), found in best.items():
        limit = least_bytes(size, batch, given.seq_len, dtype, row) / reached * given.seq_len
        table.append({"size": size, "batch": batch, "row": row, "dtype": dtype, **found, "limit": limit,
                      "tokens_per_s": batch * given.seq_len / found["seconds"]})  # fmt: skip
    return table, reached


def main() -> None:
    """Print the table and write the JSON file."""
    p = OneLineParser(prog="python -m benchmarks.sampler_speed", description=__doc__.split("\n")[0])
    p.add_argument("--size", choices=PRESETS, default="B")
    p.add_argument("--batch", type=int, nargs="+", default=[1], help="images at a time")
    p.add_argument("--plan", choices=PLANS, help="sizes and batches that are measured together, in place of both")
    p.add_argument("--seq-len", type=int, default=256, help="tokens of an image")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--rows", nargs="+", choices=ROWS, help="default: all that make sense on the device")
    p.add_argument("--rounds", type=int, default=2, help="times that all rows are measured, the best counts")
    p.add_argument("--repeats", type=int, default=2, help="batches in a round, the best counts")
    p.add_argument("--out", type=Path, help="JSON file to write, after every size and batch")
    p.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    p.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    given = p.parse_args()
    if given.row:
        measure(given)
        return
    about = {"machine": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    table: list[dict[str, Any]] = []
    for size, batches in PLANS[given.plan] if given.plan else [(given.size, given.batch)]:
        print(f"{size}, {given.seq_len} tokens, guidance {CFG_SCALE}, {given.device}, {about['threads']} threads")
        print(HEADER)
        for batch in batches:
            rows, reached = compare(given, size, batch)
            show(rows, given.seq_len)
            print(f"        reads {reached / 1e9:.1f} GB/s", flush=True)
            table += [{**row, "bytes_per_s": reached} for row in rows]
            if given.out:
                given.out.write_text(json.dumps({**about, "rows": table}, indent=1))


HEADER = "batch   row             dtype      ms/token   tokens/s   images/s   of the limit   peak MiB   warm-up (s)"


def show(table: list[dict[str, Any]], seq_len: int) -> None:
    """Print the rows."""
    for one in table:
        ms, rate = 1e3 * one["seconds"] / seq_len, one["batch"] / one["seconds"]
        print(
            f"{one['batch']:5d}   {one['row']:14s}  {one['dtype']:9s} {ms:9.2f}  {one['tokens_per_s']:9.1f}"
            f"  {rate:9.3f}  {one['limit'] / one['seconds']:12.1%}  {one['peak'] / 2**20:9.0f}  {one['warm_up']:11.1f}"
        )


if __name__ == "__main__":
    main()
