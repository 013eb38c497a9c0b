"""Convolutional VQ tokenizer: one token per cell of a grid, row by row (VQGAN as LlamaGen has it, arXiv 2406.06525).

An image shrinks through residual convolutions to a grid of latents, each becomes the nearest codebook row, and a mirror
image of the encoder grows the picture back. Encoder and decoder are those of diffusers, which are the same networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

from vision_ar.interfaces import ImageTokenizer, Preview, Tokens, TokenSpec, TrainingPass
from vision_ar.layers.perceptual import PerceptualLosses
from vision_ar.quantizers.vq import VectorQuantizer
from vision_ar.shapes import check_shape

NORM_GROUPS = 32


@dataclass
class ConvSize:
    """Sizes of encoder and decoder.

    Args:
        width: channels of the first level, a multiple of 32.
        multipliers: channels of each level over `width`, fine to coarse; every level but the last halves the sides.
        num_blocks: residual blocks of an encoder level; a decoder level has one more.
        z_channels: channels between encoder and quantizer.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_blocks: int = 2
    z_channels: int = 256

    def __post_init__(self) -> None:
        self.multipliers = tuple(self.multipliers)
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers must be at least 1, got {self.multipliers}")
        if self.width < 1 or self.width % NORM_GROUPS:
            raise ValueError(f"width must be a multiple of {NORM_GROUPS}, got {self.width}")

    @property
    def factor(self) -> int:
        """Pixels along the side of a cell."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def channels(self) -> tuple[int, ...]:
        """Of every level, fine to coarse."""
        return tuple(self.width * one for one in self.multipliers)


@dataclass
class VQLosses:
    """Weights of the training losses; those of the published recipe.

    Args:
        pixels: mean squared error of the pixels.
        lpips: perceptual distance; needs VGG weights, see `lpips_weights`.
        lpips_weights: file of torchvision's VGG-16; None looks in the cache of torch hub. Nothing is downloaded.
        classifier: distance by a small classifier of 32x32 images, in place of LPIPS. Not published.
        classifier_weights: its file or bundled name.
        codebook: codebook loss.
        commitment: commitment loss.
        entropy: of the choice of each token, less that of all tokens together: above 0 it spreads the codebook.
        revive_every: batches between revivals of unused codebook rows; 0 is never, as published.
    """

    pixels: float = 1.0
    lpips: float = 0.0
    lpips_weights: str | None = None
    classifier: float = 0.0
    classifier_weights: str = "cifar10-classifier"
    codebook: float = 1.0
    commitment: float = 0.25
    entropy: float = 0.0
    revive_every: int = 0

    def __post_init__(self) -> None:
        for name in ("pixels", "lpips", "classifier", "codebook", "commitment", "entropy"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"the weight of {name} must be at least 0, got {getattr(self, name)}")


class VQTokenizer(ImageTokenizer):
    """Images to a grid of tokens and back.

    Args:
        image_size: side of the square images, in pixels.
        channels: image channels.
        size: of encoder and decoder; 5 levels are a token for 16 x 16 pixels, 4 levels for 8 x 8.
        vocab_size: codebook rows.
        latent_dim: width of a codebook row.
        num_groups: groups of whole rows, a preview exists after each; what is not written yet is grey.
        losses: weights of the training losses.
    """

    def __init__(
        self,
        image_size: int = 256,
        channels: int = 3,
        size: ConvSize = ConvSize(),  # noqa: B008 never changed
        vocab_size: int = 16384,
        latent_dim: int = 8,
        num_groups: int = 1,
        losses: VQLosses = VQLosses(),  # noqa: B008
    ) -> None:
        super().__init__()
        if image_size % size.factor:
            raise ValueError(f"image_size must be a multiple of {size.factor} with these levels, got {image_size}")
        side = image_size // size.factor
        if num_groups < 1 or side % num_groups:
            raise ValueError(f"num_groups must divide the {side} rows of tokens, got {num_groups}")
        self.spec = TokenSpec(side * side, (side * side // num_groups,) * num_groups, vocab_size, grid=(side, side))
        self.image_size, self.channels, self.size, self.losses = image_size, channels, size, losses
        plain, last = len(size.multipliers) - 1, size.num_blocks
        self.encoder = Encoder(
            channels, size.z_channels, ("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",), size.channels,
            layers_per_block=last, norm_num_groups=NORM_GROUPS, double_z=False,
        )  # fmt: skip
        self.decoder = Decoder(
            size.z_channels, channels, ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * plain, size.channels,
            layers_per_block=last, norm_num_groups=NORM_GROUPS,
        )  # fmt: skip
        self.to_latents = nn.Linear(size.z_channels, latent_dim)  # 1x1 convolutions, kept as the matrices they are
        self.from_latents = nn.Linear(latent_dim, size.z_channels)
        self.quantizer = VectorQuantizer(vocab_size, latent_dim, revive_every=losses.revive_every)
        judge = losses.classifier_weights if losses.classifier > 0 else None
        self.perceptual = PerceptualLosses(losses.lpips, 0, None, 1, judge, losses.lpips_weights)

    @classmethod
    def tiny(cls) -> VQTokenizer:
        """8 x 8 images, 4 x 4 tokens in 4 rows."""
        return cls(8, 3, ConvSize(32, (1, 1), 1, 8), vocab_size=16, latent_dim=4, num_groups=4)

    @property
    def last_weight(self) -> Tensor:
        """Weight of the decoder's last convolution."""
        return self.decoder.conv_out.weight

    def latents(self, images: Tensor) -> Tensor:
        """Latents (B, T, C) of images, row by row, before they are quantised."""
        check_shape("images", images, "B C H W", C=self.channels, H=self.image_size, W=self.image_size)
        return self.to_latents(self.encoder(images).flatten(2).transpose(1, 2))

    def encode(self, data: Tensor, labels: Tensor | None = None) -> Tokens:
        """Tokenize images (B, C, H, W) in [-1, 1]."""
        with torch.no_grad():
            ids = self.quantizer(self.latents(data)).tokens
        return Tokens.of(self.spec, ids=ids, labels=labels)

    def decode(self, tokens: Tokens, seeds: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), about [-1, 1] but not clamped; no noise is drawn."""
        assert tokens.ids is not None
        return self.pixels(self.quantizer.lookup(tokens.ids))

    def pixels(self, rows: Tensor) -> Tensor:
        """Images of codebook rows, (B, T, C)."""
        assert self.spec.grid is not None
        z = self.from_latents(rows.to(self.from_latents.weight.dtype))
        return self.decoder(z.transpose(1, 2).unflatten(2, self.spec.grid))

    def open_preview(self, batch_size: int, seeds: Tensor | None = None) -> VQPreview:
        """Start showing rows as they come."""
        return VQPreview(self, batch_size)

    def training_pass(self, data: Tensor, generator: torch.Generator | None = None) -> TrainingPass:
        """Reconstruction, perceptual and quantisation losses; nothing is drawn."""
        weights, latents = self.losses, self.latents(data)
        found = self.quantizer(latents)
        if self.training:
            self.quantizer.track(found.tokens, latents)
        rebuilt = self.pixels(found.quantized)
        named = {
            "pixels": F.mse_loss(rebuilt.float(), data.float()),
            "codebook": found.codebook_loss.mean(),
            "commitment": found.commitment_loss.mean(),
        }
        named |= self.perceptual(data, rebuilt)
        if weights.entropy > 0:
            named["entropy"] = self.quantizer.entropy_loss(latents)
        losses = {"loss": torch.stack([getattr(weights, name) * value for name, value in named.items()]).sum(), **named}
        return TrainingPass(losses, rebuilt)

    def token_makers(self) -> dict[str, Any]:
        """Encoder and codebook; the decoder has no say."""
        weights = {f"encoder.{name}": value for name, value in self.encoder.state_dict().items()}
        weights |= {f"to_latents.{name}": value for name, value in self.to_latents.state_dict().items()}
        return {"grid": self.spec.grid, "image_size": self.image_size, "codebook": self.quantizer.codebook, **weights}

    def drop_training_parts(self) -> None:
        """Forget the judges."""
        self.losses = VQLosses()
        self.perceptual = PerceptualLosses(0, 0, None, 1)
        self.init_args["losses"] = self.losses


class VQPreview(Preview):
    """Rows of tokens that are there, as pixels; the rest is grey.

    Convolutions look around, so the pixels next to what is missing change once more when it comes.

    Args:
        tokenizer: whose tokens are fed.
        batch_size: images.
    """

    def __init__(self, tokenizer: VQTokenizer, batch_size: int) -> None:
        self._tokenizer = tokenizer
        codebook = tokenizer.quantizer.codebook
        self._rows = codebook.new_zeros(batch_size, tokenizer.spec.seq_len, codebook.shape[1], dtype=torch.float32)
        self._fed = 0

    def feed(self, ids: Tensor) -> Tensor:
        """Take the next group of ids (B, group size); return images (B, C, H, W)."""
        spec = self._tokenizer.spec
        if self._fed == len(spec.groups):
            raise RuntimeError(f"feed must be called at most {len(spec.groups)} times, once per group")
        check_shape("ids", ids, "B T", T=spec.groups[self._fed])
        start = self._fed * spec.groups[0]
        self._fed += 1
        self._rows[:, start : spec.ends[self._fed - 1]] = self._tokenizer.quantizer.lookup(ids)
        images = self._tokenizer.pixels(self._rows)
        images[:, :, images.shape[2] * self._fed // len(spec.groups) :] = 0
        return images
