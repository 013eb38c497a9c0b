"""How near our modules come to recorded outputs of published classes: python -m benchmarks.parity --reference DIR

For every record: how many values were compared, the largest difference, and how many codes or tokens differ. What the
records are says tests/golden.py; the same comparisons are tests.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.checkpoints.test_importing import filled_vq, tiny_gpt
from tests.golden import hashed_input, read_golden
from vision_ar.command_line import OneLineParser
from vision_ar.interfaces import Tokens
from vision_ar.sampler.engine import Condition, Session
from vision_ar.sampler.guidance import constant, linear
from vision_ar.sampler.logits import Law

SCHEDULES: dict[str, Any] = {
    "greedy_cfg1": None, "greedy_cfg2": constant(2.0), "greedy_cfg_1.1_to_8.0": linear(8.0, 1.1)
}  # fmt: skip
Compared = list[tuple[Tensor, Tensor]]
"""Values of ours and of the record; integers are codes."""


def vq(folder: Path, family: str) -> Compared:
    """Codes and pixels of a VQ tokenizer."""
    tokenizer, golden = filled_vq(family, folder)
    images = hashed_input(tuple(golden["image_shape"]), golden["image_seed_j"])
    codes = torch.tensor(golden["codes"])
    with torch.no_grad():
        ids, first = tokenizer.encode(images).ids, tokenizer.latents(images)[0, 0]
        pixels = tokenizer.decode(Tokens.of(tokenizer.spec, ids=codes[None]))
    assert ids is not None
    return [
        (ids[0], codes),
        (first, torch.tensor(golden["prequant_first_vec"])),
        (pixels[0, 0, 0, :8], torch.tensor(golden["decoded_ch0_row0_first8"])),
    ]


def gpt(folder: Path, system: str) -> Compared:
    """Logits and greedy tokens of a generator."""
    golden = read_golden(folder, f"{system}_gpt_tiny")
    generator = tiny_gpt(system, golden)
    label = torch.tensor([golden["class_label"]])
    plan = generator.objective.plan(Tokens.of(generator.spec, ids=torch.tensor([golden["ids"]]), labels=label))
    backbone = generator.backbone
    with torch.no_grad():
        hidden = backbone(backbone.embed(plan.inputs), backbone.place(plan.inputs), plan.attention)
        logits = generator.heads["token"](hidden)[0]
    compared = [
        (logits[0], torch.tensor(golden["logits_first_row"])),
        (logits[len(golden["ids"]) - 1], torch.tensor(golden["logits_last_row"])),
    ]
    for name, schedule in SCHEDULES.items():
        if name in golden:
            labels = torch.tensor([3, 7])
            session = Session(generator, Condition(labels=labels), torch.zeros(2).long(), Law(0), schedule)
            while not session.done:
                session.step()
            compared.append((session.ids, torch.tensor(golden[name])))
    return compared


def main() -> None:
    """Print the table."""
    p = OneLineParser(prog="python -m benchmarks.parity", description=__doc__.split("\n")[0])
    p.add_argument("--reference", type=Path, required=True, help="folder with the records, golden_*.json")
    given: argparse.Namespace = p.parse_args()
    print("record                 values   largest difference    codes   differing")
    records = {f"llamagen_{kind}": (vq, f"llamagen-{kind}") for kind in ("vq16", "vq8")}
    records |= {f"{system}_gpt_tiny": (gpt, system) for system in ("llamagen", "dar")}
    for name, (compare, argument) in records.items():
        pairs = compare(given.reference, argument)
        values = [(a, b) for a, b in pairs if a.is_floating_point()]
        codes = [(a, b) for a, b in pairs if not a.is_floating_point()]
        largest = max(float((a - b).abs().max()) for a, b in values)
        differing = sum(int((a != b).sum()) for a, b in codes)
        print(
            f"{name:20s} {sum(a.numel() for a, _ in values):8d}   {largest:18.1e} "
            f"{sum(a.numel() for a, _ in codes):8d} {differing:11d}"
        )


if __name__ == "__main__":
    main()
