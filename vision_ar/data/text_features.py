"""Features of texts, made once by any text encoder and kept in a file: what text-to-image generators are given.

    python -m vision_ar.data.text_features --encoder google/flan-t5-xl --prompts prompts.txt --out prompts.safetensors
    python sample.py --model models/llamagen-xl-t2i --features prompts.safetensors

The encoder needs the extra `text`; it is read from its folder, or from the Hugging Face Hub by its name.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vision_ar.command_line import USER_ERRORS, OneLineParser, fail
from vision_ar.shapes import check_shape

SLOTS = 120
"""Feature vectors of a text in LlamaGen."""


@dataclass
class TextFeatures:
    """Texts as an encoder gave them, padding first: the last vector is always that of the text's end.

    Args:
        features: (B, S, D), zeros where there is no text.
        mask: True for vectors of the text, (B, S).
        prompts: the texts.
    """

    features: Tensor
    mask: Tensor
    prompts: list[str]

    def __post_init__(self) -> None:
        check_shape("features", self.features, "B S D", B=len(self.prompts))
        check_shape("mask", self.mask, "B S", B=len(self.prompts), S=self.features.shape[1])

    def write(self, path: Path) -> None:
        """Keep them in a safetensors file, features in half precision."""
        tensors = {"features": self.features.to(torch.bfloat16).contiguous(), "mask": self.mask.contiguous()}
        save_file(tensors, path, {"prompts": json.dumps(self.prompts)})

    @classmethod
    def read(cls, path: Path) -> TextFeatures:
        """Those of a file.

        Raises:
            ValueError: when it is not one that `write` wrote.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                prompts = json.loads((file.metadata() or {})["prompts"])
                return cls(file.get_tensor("features").float(), file.get_tensor("mask"), prompts)
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"features must be a file of vision_ar.data.text_features, got {path}: {error}") from error


def pad_left(features: Tensor, mask: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Move the vectors of each text to the end of `slots` slots, zeros before them; longer texts lose their end.

    Args:
        features: (B, T, D), text first.
        mask: True for vectors of the text, (B, T).
        slots: S.
    """
    padded = features.new_zeros(len(features), slots, features.shape[2])
    kept = torch.zeros(len(features), slots, dtype=torch.bool)
    for row, own in enumerate(mask.bool()):
        text = features[row, own][:slots]
        padded[row, slots - len(text) :], kept[row, slots - len(text) :] = text, True
    return padded, kept


def encode_prompts(
    prompts: Sequence[str], encoder: str, slots: int = SLOTS, batch_size: int = 8, device: str = "cpu"
) -> TextFeatures:
    """Features of texts by an encoder of transformers.

    Args:
        prompts: at least one.
        encoder: folder, or name on the Hugging Face Hub; of an encoder-decoder model the encoder is used.
        slots: vectors for each text.
        batch_size: texts at a time.
        device: where the encoder runs.
    """
    if not prompts:
        raise ValueError("prompts must have at least one text, got none")
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModel.from_pretrained(encoder)
    model = (model.get_encoder() if model.config.is_encoder_decoder else model).to(device).eval()
    parts = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(
            list(prompts[start : start + batch_size]), max_length=slots, truncation=True, padding=True,
            return_tensors="pt", return_attention_mask=True,
        ).to(device)  # fmt: skip
        with torch.no_grad():
            hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        parts.append(pad_left(hidden.float().cpu(), batch["attention_mask"].cpu(), slots))
    return TextFeatures(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), list(prompts))


def main(args: Sequence[str] | None = None) -> None:
    """Write the features of prompts; user errors are one line and exit code 2."""
    p = OneLineParser(prog="python -m vision_ar.data.text_features", description=__doc__.split("\n")[0])
    p.add_argument("--encoder", required=True, help="folder or name on the Hugging Face Hub")
    p.add_argument("--prompts", type=Path, help="text file, one prompt a line")
    p.add_argument("--prompt", nargs="+", default=[], help="prompts themselves")
    p.add_argument("--slots", type=int, default=SLOTS, help=f"vectors for each text (default {SLOTS})")
    p.add_argument("--batch-size", type=int, default=8, help="texts at a time (default 8)")
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    given: argparse.Namespace = p.parse_args(args)
    try:
        lines = given.prompts.read_text(encoding="utf-8").splitlines() if given.prompts else []
        prompts = [line.strip() for line in (*given.prompt, *lines) if line.strip()]
        found = encode_prompts(prompts, given.encoder, given.slots, given.batch_size, given.device)
        found.write(given.out)
        print(f"wrote {given.out}: {len(prompts)} texts, {given.slots} vectors of {found.features.shape[2]} each")
    except USER_ERRORS as error:
        fail(error)


if __name__ == "__main__":
    main()
