"""D-AR tokenizer: one-dimensional tokens in diffusion order, coarse to fine (Gao & Shou 2025, arXiv 2505.23660).

An encoder reads image patches with causal queries, the queries are quantised, a causal decoder turns tokens into
condition vectors, and a velocity net denoises: a step reads one token group only, in order. Hence every prefix of the
tokens is already a picture, and a new group costs its own steps, one with the published 8 groups and 8 steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ar.interfaces import AttentionPattern, ImageTokenizer, Preview, Tokens, TokenSpec, TrainingPass
from vision_ar.layers.attention import Allowed, allow
from vision_ar.layers.blocks import GatedBlock, plain_norm
from vision_ar.layers.classifier import IMAGE_SIZE as JUDGED_SIZE
from vision_ar.layers.flow import FlowPath, group_at, shift_time
from vision_ar.layers.kv_cache import KVCache, new_cache
from vision_ar.layers.noise import keyed_normal
from vision_ar.layers.perceptual import PerceptualLosses
from vision_ar.layers.rope import rotary_table
from vision_ar.layers.velocity import VelocityConfig, VelocityNet
from vision_ar.quantizers.vq import VectorQuantizer
from vision_ar.shapes import check_shape

QUERY_RANK = 8  # D-AR code: queries are rows of a table this wide, then projected
QUERY_SPARE = 1024  # D-AR code: query and decoder tables have at least this many rows


@dataclass
class CoderConfig:
    """Sizes of the encoder and of the causal decoder.

    Args:
        dim: width.
        depth: number of blocks.
        head_dim: width of an attention head.
        gate_init: start of the branch scales; 0 as published, larger values learn faster in short trainings.
        patch_size: side of an encoder patch, in pixels.
    """

    dim: int = 768
    depth: int = 8
    head_dim: int = 64
    gate_init: float = 0.0
    patch_size: int = 16


@dataclass
class FlowConfig:
    """The diffusion part of the tokenizer.

    Args:
        data_std: images are multiplied by this before noise is added.
        time_shift: shift of the time, 1 is none.
        decoding_shift: shift of the decoding steps; None is time_shift, as published.
        num_steps: denoising steps when decoding; None is one per group, but at least 8;
            with fewer steps than groups some groups are never read.
        solver: ab2 (Adams-Bashforth, published) or euler.
        noise_scale: the noise that decoding starts from is multiplied by this; 1 as published, less is smoother and
            nearer to the original.
    """

    data_std: float = 0.6
    time_shift: float = 2.0
    decoding_shift: float | None = None
    num_steps: int | None = None
    solver: str = "ab2"
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.solver not in ("ab2", "euler"):
            raise ValueError(f"solver must be ab2 or euler, got {self.solver!r}")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
        if not self.noise_scale >= 0:
            raise ValueError(f"noise_scale must be at least 0, got {self.noise_scale}")
        for name in ("data_std", "time_shift", "decoding_shift"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")


@dataclass
class LossConfig:
    """Weights of the training losses beside the flow loss, which has weight 1.

    Args:
        codebook: codebook loss.
        commitment: commitment loss.
        lpips: perceptual distance of the one-step estimate; needs VGG weights that torchvision can load.
        classifier: the same by a small classifier of 32x32 images instead of VGG. Not published.
        classifier_weights: its file (`benchmarks/train_classifier.py` makes one) or bundled name. A classifier that
            trained a tokenizer is no fair judge of it.
        repa: alignment of the velocity net with DINOv2 features; needs `repa_weights`.
        repa_layer: velocity block on whose input the alignment reads.
        repa_weights: file with DINOv2 ViT-B/14 weights as timm stores them.
        revive_every: batches between revivals of unused codebook rows; 0 is never, as published.
        anchor: error of linear read-outs of the image from the tokens of every prefix of the groups and from the
            condition vectors of the drawn group, see `Anchor`. Not published, where it is 0: it gives encoder and
            decoder a direct gradient, which a short training needs.
    """

    codebook: float = 1.0
    commitment: float = 0.25
    lpips: float = 0.0
    classifier: float = 0.0
    classifier_weights: str = "cifar10-classifier"
    repa: float = 0.0
    repa_layer: int = 8
    repa_weights: str | None = None
    revive_every: int = 0
    anchor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("codebook", "commitment", "lpips", "classifier", "repa", "anchor"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"the weight of {name} must be at least 0, got {getattr(self, name)}")


class DiffusionTokenizer(ImageTokenizer):
    """Images to diffusion-ordered tokens and back.

    Args:
        image_size: side of the square images, in pixels.
        channels: image channels.
        seq_len: tokens per image.
        num_groups: decoding groups of equal size; 1 switches the order off (every step reads all tokens).
        group_sizes: tokens of each group, coarse to fine, in place of `num_groups` equal ones; growing groups make
            every group add about as much to the picture. Not published.
        vocab_size: codebook rows.
        latent_dim: width of a codebook row.
        encoder: sizes of the patch encoder.
        decoder: sizes of the causal decoder; its patch_size is not used.
        velocity: sizes of the velocity net.
        flow: time, scale and solver.
        losses: weights of the training losses.
        fine_to_coarse: emit the groups in reverse order, for comparison; no preview is possible before the end.
    """

    def __init__(
        self,
        image_size: int = 256,
        channels: int = 3,
        seq_len: int = 256,
        num_groups: int = 8,
        vocab_size: int = 16384,
        latent_dim: int = 8,
        encoder: CoderConfig = CoderConfig(),  # noqa: B008 never changed
        decoder: CoderConfig = CoderConfig(),  # noqa: B008
        velocity: VelocityConfig = VelocityConfig(),  # noqa: B008
        flow: FlowConfig = FlowConfig(),  # noqa: B008
        losses: LossConfig = LossConfig(),  # noqa: B008
        fine_to_coarse: bool = False,
        group_sizes: list[int] | None = None,
    ) -> None:
        super().__init__()
        if group_sizes is None:
            if num_groups < 1 or seq_len % num_groups:
                raise ValueError(f"num_groups must divide seq_len={seq_len}, got {num_groups}")
            group_sizes = [seq_len // num_groups] * num_groups
        if not group_sizes or min(group_sizes) < 1 or sum(group_sizes) != seq_len:
            raise ValueError(f"group_sizes must be positive and sum to seq_len={seq_len}, got {group_sizes}")
        for name, side in (("encoder", encoder.patch_size), ("velocity", velocity.patch_size)):
            if image_size % side:
                raise ValueError(f"{name} patch_size must divide image_size={image_size}, got {side}")
        self.group_sizes = tuple(group_sizes)  # coarse to fine; the spec has them as they are emitted
        emitted = self.group_sizes[::-1] if fine_to_coarse else self.group_sizes
        self.spec = TokenSpec(seq_len, emitted, vocab_size=vocab_size)
        self.image_size, self.channels, self.flow = image_size, channels, flow
        self.fine_to_coarse = fine_to_coarse
        self.encoder = PatchEncoder(encoder, image_size, channels, seq_len, latent_dim)
        self.quantizer = VectorQuantizer(vocab_size, latent_dim, revive_every=losses.revive_every)
        self.decoder = CausalDecoder(decoder, seq_len, latent_dim)
        self.velocity = VelocityNet(velocity, channels, decoder.dim)
        judge = losses.classifier_weights if losses.classifier > 0 else None
        if judge is not None and (image_size, channels) != (JUDGED_SIZE, 3):
            wanted = f"losses.classifier must be 0 unless images are {JUDGED_SIZE} x {JUDGED_SIZE} with 3 channels"
            raise ValueError(f"{wanted}, got {image_size} x {image_size} with {channels}")
        self.perceptual = PerceptualLosses(losses.lpips, losses.repa, losses.repa_weights, velocity.dim, judge)
        if losses.repa > 0 and not 0 <= losses.repa_layer < velocity.depth:
            raise ValueError(f"repa_layer must be from 0 to {velocity.depth - 1}, got {losses.repa_layer}")
        self.losses = losses
        self.anchor = None
        if losses.anchor > 0:
            self.anchor = Anchor(self.group_sizes, latent_dim, decoder.dim, channels, image_size)

    @classmethod
    def tiny(cls) -> DiffusionTokenizer:
        """8 x 8 images, 8 tokens in 4 groups; about 60,000 weights."""
        coder = CoderConfig(dim=32, depth=1, head_dim=16, patch_size=4, gate_init=0.5)
        velocity = VelocityConfig(dim=32, depth=1, patch_size=4, head_dim=16)
        return cls(8, 3, 8, 4, vocab_size=16, latent_dim=4, encoder=coder, decoder=coder, velocity=velocity)

    def encode(self, data: Tensor, labels: Tensor | None = None) -> Tokens:
        """Tokenize images (B, C, H, W) in [-1, 1]."""
        size = self.image_size
        check_shape("images", data, "B C H W", C=self.channels, H=size, W=size)
        with torch.no_grad():
            ids = self.quantizer(self.encoder(data)).tokens
        return Tokens.of(self.spec, ids=self._reordered(ids, self.group_sizes), labels=labels)

    def decode(self, tokens: Tokens, seeds: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), about [-1, 1] but not clamped."""
        assert tokens.ids is not None
        ids = self._reordered(tokens.ids, self.spec.groups)
        walk = self._open_walk(self.start_noise(ids.shape[0], seeds))
        cond = self.decoder(self.quantizer.lookup(ids))
        for group, vectors in enumerate(cond.split(self.group_sizes, dim=1)):
            self._denoise(walk, group, vectors)
        return walk.x / self.flow.data_std

    def open_preview(self, batch_size: int, seeds: Tensor | None = None) -> DiffusionPreview:
        """Start a streaming decode: each group fed costs its steps, one when there are as many steps as groups."""
        return DiffusionPreview(self, self.start_noise(batch_size, seeds))

    def start_noise(self, batch_size: int, seeds: Tensor | None) -> Tensor:
        """The noise each decode starts from, (B, C, H, W), a function of the row's seed alone."""
        device = self.quantizer.codebook.device
        seeds = torch.zeros(batch_size, dtype=torch.int64) if seeds is None else seeds
        check_shape("seeds", seeds, "B", B=batch_size)
        shape = (self.channels, self.image_size, self.image_size)
        return self.flow.noise_scale * keyed_normal(seeds.to(device), shape)

    def training_pass(self, data: Tensor, generator: torch.Generator | None = None) -> TrainingPass:
        """Flow loss at a random time per image, with quantisation losses on the tokens known by then."""
        raw = torch.rand(data.shape[0], generator=generator, device=generator.device if generator else data.device)
        return self.pass_at(data, raw.to(data.device), keyed_or_random(data, generator))

    @property
    def last_weight(self) -> Tensor:
        """Weight of the last layer of the velocity net."""
        return self.velocity.conv_out.weight

    def pass_at(self, data: Tensor, raw: Tensor, noise: Tensor) -> TrainingPass:
        """Losses at given raw times (B,) in [0, 1) and noise (B, C, H, W); the estimate is that of one step."""
        weights, std = self.losses, self.flow.data_std
        latents = self.encoder(data)
        found = self.quantizer(latents)
        if self.training:  # bookkeeping only: the losses are the same in both modes
            self.quantizer.track(found.tokens, latents)
        group = group_at(raw, len(self.group_sizes))
        cond, cond_mask, known = pick_groups(self.decoder(found.quantized), group, self.group_sizes)
        time = shift_time(raw, self.flow.time_shift)
        fade = time[:, None, None, None]
        noisy = fade * std * data + (1 - fade) * noise
        repa = self.perceptual.uses_repa
        layer = weights.repa_layer if repa else None
        velocity, features = self.velocity.with_features(noisy, time, cond, cond_mask, layer)
        named = {
            "flow": F.mse_loss(velocity, std * data - noise) / std**2,
            "codebook": masked_mean(found.codebook_loss, known),
            "commitment": masked_mean(found.commitment_loss, known),
        }
        named["loss"] = named["flow"] + weights.codebook * named["codebook"] + weights.commitment * named["commitment"]
        if self.anchor is not None:
            named["anchor"] = self.anchor(found.quantized, cond, cond_mask, data)
        estimate = (noisy + (1 - fade) * velocity) / std
        named |= self.perceptual(data, estimate, features)
        for name in ("anchor", "lpips", "classifier", "repa"):
            if name in named:
                named["loss"] = named["loss"] + getattr(weights, name) * named[name]
        return TrainingPass(named, estimate)

    def token_makers(self) -> dict[str, Any]:
        """Encoder, codebook and order; the decoder has no say."""
        weights = {f"encoder.{name}": value for name, value in self.encoder.state_dict().items()}
        sizes = {"spec": self.spec, "image_size": self.image_size, "encoder": self.encoder.config}
        return {**sizes, **weights, "codebook": self.quantizer.codebook, "fine_to_coarse": self.fine_to_coarse}

    def drop_training_parts(self) -> None:
        """Forget the read-out and the judges; losses are the published ones then."""
        self.anchor, self.losses = None, LossConfig()
        self.perceptual = PerceptualLosses(0, 0, None, 1)
        self.init_args["losses"] = self.losses

    def _reordered(self, ids: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Ids (B, T) in groups of these sizes, between encoder order and emitted order."""
        return torch.cat(ids.split(sizes, dim=1)[::-1], dim=1) if self.fine_to_coarse else ids

    def _open_walk(self, noise: Tensor) -> FlowPath:
        steps = self.flow.num_steps or max(len(self.group_sizes), 8)
        shift = self.flow.decoding_shift or self.flow.time_shift
        times = shift_time(torch.arange(steps + 1) / steps, shift).tolist()
        return FlowPath(noise, times, second_order=self.flow.solver == "ab2")

    def _denoise(self, walk: FlowPath, group: int, cond: Tensor) -> None:
        """Take the steps that read `group`, with its condition vectors (B, S, D)."""
        steps = len(walk.times) - 1
        while walk.step < steps:
            raw = torch.tensor(walk.step / steps)
            if int(group_at(raw, len(self.group_sizes))) != group:
                return
            time = torch.full((walk.x.shape[0],), walk.times[walk.step], device=walk.x.device)
            walk.advance(self.velocity(walk.x.to(cond.dtype), time, cond).float())


def pick_groups(conditions: Tensor, group: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor | None, Tensor]:
    """The condition vectors of one group for each row.

    Args:
        conditions: of all tokens, (B, T, D).
        group: wanted in each row, (B,).
        sizes: of the groups.

    Returns:
        Vectors (B, S, D) with S the largest size, True where they are real (B, S) or None when all are, and True for
        the tokens up to the end of the wanted group (B, T).
    """
    lengths = torch.tensor(sizes, device=group.device)
    ends = lengths.cumsum(0)[group, None]  # (B, 1)
    real = torch.arange(max(sizes), device=group.device) < lengths[group, None]
    tokens = torch.arange(conditions.shape[1], device=group.device)
    columns = (ends - lengths[group, None] + tokens[: max(sizes)]).clamp(max=conditions.shape[1] - 1)
    rows = torch.arange(len(group), device=group.device)[:, None]
    return conditions[rows, columns], None if min(sizes) == max(sizes) else real, tokens < ends


def masked_mean(values: Tensor, kept: Tensor) -> Tensor:
    """Mean of values (B, T) where `kept` is True."""
    return (values * kept).sum() / kept.sum()


def keyed_or_random(data: Tensor, generator: torch.Generator | None) -> Tensor:
    """Normal noise of the shape of `data`, from the generator, on the device of `data`."""
    device = generator.device if generator else data.device
    return torch.randn(data.shape, generator=generator, device=device).to(data.device)


class DiffusionPreview(Preview):
    """Streaming decoder: the causal decoder keeps a cache, each group takes its step and can be shown.

    Args:
        tokenizer: whose tokens are fed.
        noise: what the walk starts from, (B, C, H, W).
    """

    def __init__(self, tokenizer: DiffusionTokenizer, noise: Tensor) -> None:
        self._tokenizer = tokenizer
        self._walk = tokenizer._open_walk(noise)
        self._cache = tokenizer.decoder.new_cache(noise.shape[0])
        self._waiting: list[Tensor] = []  # fine groups that came before the coarse ones
        self._fed = 0

    def feed(self, ids: Tensor) -> Tensor | None:
        """Take the next group of ids (B, group size); return images (B, C, H, W) or None while nothing is visible."""
        tokenizer, sizes = self._tokenizer, self._tokenizer.spec.groups
        if self._fed == len(sizes):
            raise RuntimeError(f"feed must be called at most {len(sizes)} times, once per group")
        check_shape("ids", ids, "B T", T=sizes[self._fed])
        self._fed += 1
        if tokenizer.fine_to_coarse:
            self._waiting.insert(0, ids)
            if self._fed < len(sizes):
                return None
            return self._tokenizer_order(self._waiting)
        return self._show(self._fed - 1, ids)

    def _tokenizer_order(self, groups: list[Tensor]) -> Tensor:
        for number, ids in enumerate(groups):
            image = self._show(number, ids)
        return image

    def _show(self, group: int, ids: Tensor) -> Tensor:
        cond = self._tokenizer.decoder(self._tokenizer.quantizer.lookup(ids), self._cache)
        self._tokenizer._denoise(self._walk, group, cond)
        return self._walk.jump() / self._tokenizer.flow.data_std


class Anchor(nn.Module):
    """Linear read-outs of the image from the tokens, for training only: group after group adds what it knows.

    The read-out after group g is the sum of one linear map for each group up to g. Every group is asked for what the
    groups before it leave open, so that the tokens order themselves as principal components do. A second read-out, from
    the condition vectors of one group, asks the causal decoder to gather what all groups up to there said. Nested
    read-outs of condition vectors alone, in place of tokens, help no more than none: 9.8 against 12.7 dB on digits.

    Args:
        group_sizes: tokens of each group.
        latent_dim: width of a codebook row.
        dim: width of a condition vector D.
        channels: image channels C.
        image_size: side of the images; the read-out has at most 32.

    Source:
        Own; the nesting is that of Rippel et al. 2014, arXiv 1402.0915, with all prefixes at once.
    """

    def __init__(self, group_sizes: tuple[int, ...], latent_dim: int, dim: int, channels: int, image_size: int) -> None:
        super().__init__()
        self.side = min(32, image_size)
        self.widths = [latent_dim * size for size in group_sizes]
        pixels, mean_width = channels * self.side**2, sum(self.widths) / len(self.widths)
        self.weight = nn.Parameter(0.1 * mean_width**-0.5 * torch.randn(sum(self.widths), pixels))
        self.bias = nn.Parameter(torch.zeros(pixels))
        self.read_cond = nn.Linear(max(group_sizes) * dim, pixels)

    def forward(self, quantized: Tensor, cond: Tensor, cond_mask: Tensor | None, images: Tensor) -> Tensor:
        """Mean squared error of the read-outs against the images, the mean over prefixes plus that of the condition.

        Args:
            quantized: codebook rows of all tokens, (B, T, C).
            cond: condition vectors of one group, (B, S, D).
            cond_mask: True for the real ones, (B, S), or None.
            images: (B, C, H, W).
        """
        wanted = F.adaptive_avg_pool2d(images, self.side).flatten(1)
        parts = zip(quantized.flatten(1).split(self.widths, dim=1), self.weight.split(self.widths), strict=True)
        read = (
            torch.stack([rows @ weight for rows, weight in parts]).float().cumsum(dim=0) + self.bias
        )  # (K, B, pixels)
        cond = cond if cond_mask is None else cond * cond_mask[:, :, None]
        return (read - wanted).square().mean() + F.mse_loss(self.read_cond(cond.flatten(1)).float(), wanted)


class PatchEncoder(nn.Module):
    """Patches and causal queries in one transformer: patches see patches, query i sees patches and queries <= i.

    Args:
        config: sizes.
        image_size: side of the images.
        channels: image channels.
        seq_len: number of queries T.
        latent_dim: width of the output C.
    """

    def __init__(self, config: CoderConfig, image_size: int, channels: int, seq_len: int, latent_dim: int) -> None:
        super().__init__()
        self.config, self.seq_len, self.grid = config, seq_len, image_size // config.patch_size
        self.patchify = nn.Conv2d(channels, config.dim, config.patch_size, config.patch_size)
        self.query_table = nn.Parameter(torch.randn(max(seq_len, QUERY_SPARE), QUERY_RANK))
        self.query_proj = nn.Linear(QUERY_RANK, config.dim)
        self.blocks = nn.ModuleList(
            GatedBlock(config.dim, config.head_dim, config.gate_init) for _ in range(config.depth)
        )
        self.to_latents = nn.Linear(config.dim, latent_dim, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Latents (B, T, C) of images (B, C, H, W)."""
        patches = plain_norm(self.patchify(images).flatten(2).transpose(1, 2))  # (B, P, D)
        queries = self.query_proj(self.query_table[: self.seq_len]).expand(images.shape[0], -1, -1)
        x = torch.cat([patches, queries.to(patches.dtype)], dim=1)
        table, allowed = self._table(images.device), self._allowed(patches.shape[1], images.device)
        for block in self.blocks:
            x = block(x, allowed, table)
        return self.to_latents(plain_norm(x[:, patches.shape[1] :]))

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        side = torch.arange(self.grid, device=device)
        places = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).flatten(0, 1)
        # queries sit at the origin, where rotation is the identity
        return rotary_table(F.pad(places, (0, 0, 0, self.seq_len))[None], self.config.head_dim)

    def _allowed(self, num_patches: int, device: torch.device) -> Allowed:
        return allow(AttentionPattern("prefix", prefix_len=num_patches), num_patches + self.seq_len, 0, device)


class CausalDecoder(nn.Module):
    """Tokens to condition vectors; vector t depends on tokens <= t only, so it can be run as tokens arrive.

    Args:
        config: sizes.
        seq_len: tokens T.
        latent_dim: width of a codebook row C.
    """

    def __init__(self, config: CoderConfig, seq_len: int, latent_dim: int) -> None:
        super().__init__()
        self.config, self.seq_len = config, seq_len
        self.from_latents = nn.Linear(latent_dim, config.dim, bias=False)
        self.positions = nn.Parameter(0.02 * torch.randn(max(seq_len, QUERY_SPARE), config.dim))
        self.blocks = nn.ModuleList(
            GatedBlock(config.dim, config.head_dim, config.gate_init) for _ in range(config.depth)
        )

    def forward(self, quantized: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        """Condition vectors (B, T, D) of codebook rows (B, T, C); with a cache, of the next T rows."""
        start = (kv_cache.common_length or 0) if kv_cache is not None else 0
        length = quantized.shape[1]
        x = self.from_latents(quantized.to(self.from_latents.weight.dtype)) + self.positions[start : start + length]
        allowed = allow(AttentionPattern(), length, 0, x.device, kv_cache)
        for layer, block in enumerate(self.blocks):
            x = block(x, allowed, None, kv_cache, layer)
        if kv_cache is not None:
            kv_cache.commit()
        return plain_norm(x)

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache for whole sequences."""
        heads, like = self.config.dim // self.config.head_dim, self.positions.detach()
        return new_cache(self.config.depth, batch_size, heads, self.seq_len, self.config.head_dim, like)
