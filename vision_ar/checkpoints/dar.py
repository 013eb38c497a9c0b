"""D-AR (Gao & Shou 2025, arXiv 2505.23660): the tokenizer and the two published generators."""

from __future__ import annotations

from functools import partial
from typing import Any

from vision_ar.checkpoints.families import Entry, Family
from vision_ar.checkpoints.llamagen import DEPTHS, gpt_entries, pairs

CODER_DEPTH, VELOCITY_DEPTH = 8, 12
CFG = {"l": 8.0, "xl": 10.0}
"""Guidance at the last token; it starts at 1.1."""


def attention(ours: str, published: str) -> list[Entry]:
    """Entries of one attention layer."""
    names = ("q", "k", "v", "proj", "q_norm", "k_norm")
    return [entry for name in names for entry in pairs(f"{ours}.{name}", f"{published}.{name}")]


def coder_entries(side: str, depth: int) -> list[Entry]:
    """Entries of the blocks of encoder or decoder."""
    entries = []
    for layer in range(depth):
        ours, published = f"{side}.blocks.{layer}", f"{side}_layers.{layer}"
        entries += [Entry(f"{ours}.{gate}", (f"{published}.{gate}",)) for gate in ("gate1", "gate2")]
        entries += attention(f"{ours}.attn", f"{published}.attention")
        for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            entries += pairs(f"{ours}.{name}", f"{published}.{name}")
    return entries


def velocity_entries(depth: int) -> list[Entry]:
    """Entries of the velocity net."""
    net = "diff_decoder.net"
    entries = pairs("velocity.conv_in", f"{net}.conv_in", matrix=True)
    entries += pairs("velocity.conv_out", f"{net}.conv_out", matrix=True) + pairs(
        "velocity.cond_proj", f"{net}.cond_mlp"
    )
    for layer in range(depth):
        ours, published = f"velocity.blocks.{layer}", f"{net}.blocks.{layer}"
        entries += attention(f"{ours}.attn", f"{published}.attention")
        entries += attention(f"{ours}.cross_attn", f"{published}.cross_attn")
        names = {"modulation": "adaLN_modulation.1", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        names |= {f"time_mlp.{n}": f"time_embed.mlp.{n}" for n in (0, 2)}
        names |= {f"cond_mlp.{n}": f"cond_embed.{n}" for n in (0, 2)}
        for mine, name in names.items():
            entries += pairs(f"{ours}.{mine}", f"{published}.{name}")
    return entries


def tokenizer_entries(coder_depth: int = CODER_DEPTH, velocity_depth: int = VELOCITY_DEPTH) -> list[Entry]:
    """Entries of the tokenizer."""
    entries = coder_entries("encoder", coder_depth) + coder_entries("decoder", coder_depth)
    entries += pairs("encoder.patchify", "patchify") + pairs("encoder.query_proj", "query_linear")
    entries += [
        Entry("encoder.query_table", ("query_embedding.weight",)),
        Entry("decoder.positions", ("decoder_embedding.weight",)),
        Entry("quantizer.codebook", ("quantize.embedding.weight",)),
        Entry("encoder.to_latents.weight", ("quant_in_conv.weight",), matrix=True),
        Entry("decoder.from_latents.weight", ("quant_out_conv.weight",), matrix=True),
    ]
    return entries + velocity_entries(velocity_depth)


def tokenizer_described(image_size: int) -> dict[str, Any]:
    """Our tokenizer for it: its defaults are the published sizes."""
    arguments = {"image_size": image_size}
    return {"class_path": "vision_ar.tokenizers.diffusion.DiffusionTokenizer", "init_args": arguments}


def guidance(size: str, image_size: int) -> dict[str, Any]:
    """Guidance of the published figures."""
    return {"cfg_scale": CFG[size], "cfg_schedule": "linear", "cfg_start": 1.1}


def gpt_described(preset: str, image_size: int) -> dict[str, Any]:
    """Our backbone for it: positions count the tokens, and the class is one of them."""
    arguments = {"size": {"preset": preset}, "num_classes": 1000, "rotary": "1d"}
    return {"class_path": "vision_ar.backbones.llama.Llama", "init_args": arguments}


FAMILIES = [
    Family(
        "dar-tokenizer", "tokenizer", tokenizer_entries, tokenizer_described, (256,), ("ema", "model"),
        "showlab/D-AR: D-AR-tokenizer_v1.pt",
    ),
    *(
        Family(
            f"dar-{size}", "generator", partial(gpt_entries, DEPTHS[size]), partial(gpt_described, size.upper()),
            (256,), ("model", "module", "state_dict"), f"showlab/D-AR: D-AR-{size.upper()}-360K.pt",
            tokenizer="dar-tokenizer",
            sampling=partial(guidance, size),
        )
        for size in CFG
    ),
]  # fmt: skip
