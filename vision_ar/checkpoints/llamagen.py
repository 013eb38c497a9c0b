"""LlamaGen (Sun et al. 2024, arXiv 2406.06525): VQ tokenizers, class-conditional GPTs and the text-to-image one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from vision_ar.checkpoints.families import Entry, Family

VQ = {"vq16": (1, 1, 2, 2, 4), "vq8": (1, 2, 2, 4)}
DEPTHS = {"b": 12, "l": 24, "xl": 36, "xxl": 48, "3b": 24}
IMAGE_SIZES = {"b": (256, 384), "l": (256, 384), "xl": (384,), "xxl": (384,), "3b": (384,)}
CFG = {"b": (2.0, 2.25), "l": (1.75, 2.0), "xl": (1.75,), "xxl": (1.75,), "3b": (1.65,)}
"""Guidance of the published figures, for each of the sizes."""
TEXT_DIM, TEXT_LEN = 2048, 120


def pairs(ours: str, published: str, parts: tuple[str, ...] = ("weight", "bias"), matrix: bool = False) -> list[Entry]:
    """Entries of one layer."""
    return [Entry(f"{ours}.{part}", (f"{published}.{part}",), matrix and part == "weight") for part in parts]


def residual(ours: str, published: str, widens: bool) -> list[Entry]:
    """Entries of one residual block."""
    entries = [
        e for name in ("norm1", "conv1", "norm2", "conv2") for e in pairs(f"{ours}.{name}", f"{published}.{name}")
    ]
    return entries + (pairs(f"{ours}.conv_shortcut", f"{published}.nin_shortcut") if widens else [])


def attention(ours: str, published: str) -> list[Entry]:
    """Entries of one attention block, whose 1x1 convolutions are matrices here."""
    names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    made = [pairs(f"{ours}.{mine}", f"{published}.{name}", matrix=mine != "group_norm") for mine, name in names.items()]
    return [entry for entries in made for entry in entries]


def middle(side: str) -> list[Entry]:
    """Entries between the levels of encoder or decoder, and of its ends."""
    entries = residual(f"{side}.mid_block.resnets.0", f"{side}.mid.0", False)
    entries += attention(f"{side}.mid_block.attentions.0", f"{side}.mid.1")
    entries += residual(f"{side}.mid_block.resnets.1", f"{side}.mid.2", False)
    for mine, name in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
        entries += pairs(f"{side}.{mine}", f"{side}.{name}")
    return entries


def vq_entries(multipliers: tuple[int, ...], num_blocks: int = 2) -> list[Entry]:
    """Entries of a VQ tokenizer with these levels."""
    entries, last, levels = middle("encoder") + middle("decoder"), multipliers[0], len(multipliers)
    for side, block, sampler, order in (
        ("encoder", "down_blocks", "downsample", multipliers),
        ("decoder", "up_blocks", "upsample", multipliers[::-1]),
    ):
        last = order[0]
        for level, multiplier in enumerate(order):
            ours, published = f"{side}.{block}.{level}", f"{side}.conv_blocks.{level}"
            for number in range(num_blocks + (side == "decoder")):
                entries += residual(f"{ours}.resnets.{number}", f"{published}.res.{number}", last != multiplier)
                last = multiplier
                if level == (levels - 1 if side == "encoder" else 0):
                    entries += attention(f"{ours}.attentions.{number}", f"{published}.attn.{number}")
            if level < levels - 1:
                entries += pairs(f"{ours}.{sampler}rs.0.conv", f"{published}.{sampler}.conv")
    entries += pairs("to_latents", "quant_conv", matrix=True) + pairs("from_latents", "post_quant_conv", matrix=True)
    return [*entries, Entry("quantizer.codebook", ("quantize.embedding.weight",))]


def vq_described(multipliers: tuple[int, ...], image_size: int) -> dict[str, Any]:
    """Our tokenizer for it."""
    arguments = {"image_size": image_size, "size": {"multipliers": list(multipliers)}}
    return {"class_path": "vision_ar.tokenizers.vq.VQTokenizer", "init_args": arguments}


def gpt_entries(depth: int, text: bool = False) -> list[Entry]:
    """Entries of a GPT with so many blocks; D-AR's have the same names."""
    entries = [Entry("backbone.token_table.weight", ("tok_embeddings.weight",))]
    if text:
        condition = {"fc1.weight": "cap_proj.fc1.weight", "fc2.weight": "cap_proj.fc2.weight"}
        condition["null_features"] = "uncond_embedding"
        entries += [Entry(f"backbone.condition.{a}", (f"cls_embedding.{b}",)) for a, b in condition.items()]
    else:
        entries += [Entry("backbone.label_table.weight", ("cls_embedding.embedding_table.weight",))]
    names = {
        "qkv": ("attention.wqkv",), "out": ("attention.wo",), "mlp.gate_up": ("feed_forward.w1", "feed_forward.w3"),
        "mlp.down": ("feed_forward.w2",), "attention_norm": ("attention_norm",), "mlp_norm": ("ffn_norm",),
    }  # fmt: skip
    for layer in range(depth):
        for ours, published in names.items():
            made_of = tuple(f"layers.{layer}.{name}.weight" for name in published)
            entries.append(Entry(f"backbone.blocks.{layer}.{ours}.weight", made_of))
    entries += [Entry("backbone.norm.weight", ("norm.weight",))]
    return [*entries, Entry("heads.token.output.weight", ("output.weight",))]


def gpt_described(preset: str, image_size: int, text: bool = False) -> dict[str, Any]:
    """Our backbone for it: rotary positions on the grid, and a prefix that is never turned nor heard."""
    arguments: dict[str, Any] = {"size": {"preset": preset}, "rotary": "2d", "silent_prefix": True}
    arguments |= {"cond_dim": TEXT_DIM, "cond_len": TEXT_LEN} if text else {"num_classes": 1000}
    return {"class_path": "vision_ar.backbones.llama.Llama", "init_args": arguments}


def guidance(size: str, image_size: int) -> dict[str, Any]:
    """Guidance of the published figures for images of this size, or of the nearest."""
    return {"cfg_scale": CFG[size][-1 if image_size >= IMAGE_SIZES[size][-1] else 0]}


def gpt(size: str) -> Family:
    """The class-conditional GPT of one size."""
    sets = ("model", "module", "state_dict")
    described: Callable[[int], dict[str, Any]] = partial(gpt_described, size.upper())
    return Family(
        f"llamagen-gpt-{size}", "generator", partial(gpt_entries, DEPTHS[size]), described, IMAGE_SIZES[size], sets,
        f"FoundationVision/LlamaGen: c2i_{size.upper()}_{{256,384}}.pt", tokenizer="llamagen-vq16",
        sampling=partial(guidance, size),
    )  # fmt: skip


FAMILIES = [
    *(
        Family(
            f"llamagen-{name}", "tokenizer", partial(vq_entries, levels), partial(vq_described, levels), (256, 384),
            ("model", "ema"), f"FoundationVision/LlamaGen: vq_ds{name[2:]}_c2i.pt",
        )
        for name, levels in VQ.items()
    ),
    *(gpt(size) for size in DEPTHS),
    Family(
        "llamagen-gpt-xl-t2i", "generator", partial(gpt_entries, DEPTHS["xl"], True),
        partial(gpt_described, "XL", text=True), (256, 512), ("model", "module", "state_dict"),
        "peizesun/llamagen_t2i: t2i_XL_stage1_256.pt, t2i_XL_stage2_512.pt", tokenizer="llamagen-vq16",
        sampling=lambda image_size: {"cfg_scale": 7.5},
    ),
]  # fmt: skip
