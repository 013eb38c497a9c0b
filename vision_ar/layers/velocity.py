"""Velocity net of the D-AR decoder: a diffusion transformer that reads one group of tokens per step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vision_ar.layers.attention import Allowed
from vision_ar.layers.blocks import NormedAttention, SiluMLP, Table, plain_norm
from vision_ar.layers.rope import rotary_table

TIME_SCALE = 1000.0  # D-AR code: sinusoids see 1000 t


@dataclass
class VelocityConfig:
    """Sizes of the velocity net.

    Args:
        dim: width.
        depth: number of blocks.
        patch_size: side of an image patch, in pixels.
        head_dim: width of an attention head.
    """

    dim: int = 768
    depth: int = 12
    patch_size: int = 8
    head_dim: int = 64


def time_sinusoid(time: Tensor, dim: int) -> Tensor:
    """Cosines then sines of 1000 t at `dim` / 2 frequencies, (B, dim), float32."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=time.device))
    angles = TIME_SCALE * time.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class VelocityBlock(nn.Module):
    """One block: the condition acts through the modulation of every patch, never through the residual stream.

    Args:
        config: sizes.
    """

    def __init__(self, config: VelocityConfig) -> None:
        super().__init__()
        dim = config.dim
        self.time_mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.cond_mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.cross_attn = NormedAttention(dim, config.head_dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.attn, self.mlp = NormedAttention(dim, config.head_dim), SiluMLP(dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor, heard: Allowed, table: Table) -> Tensor:
        """Refine patches.

        Args:
            x: patch vectors, (B, T, D).
            time: sinusoids, (B, D).
            cond: condition tokens of the current group, (B, S, D).
            heard: which of them are real.
            table: rotary table of the patch grid.
        """
        cond = plain_norm(self.cond_mlp(cond))
        signal = self.time_mlp(time)[:, None] + self.cross_attn(plain_norm(x), cond, heard, table)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(F.silu(signal)).chunk(6, dim=-1)
        y = plain_norm(x) * (1 + scale_1) + shift_1
        x = x + gate_1 * self.attn(y, query_table=table, key_table=table)
        return x + gate_2 * self.mlp(plain_norm(x) * (1 + scale_2) + shift_2)


class VelocityNet(nn.Module):
    """Predict dx/dt of noisy images from one group of condition tokens.

    Args:
        config: sizes.
        channels: image channels C.
        cond_dim: width of the condition tokens.
    """

    def __init__(self, config: VelocityConfig, channels: int, cond_dim: int) -> None:
        super().__init__()
        self.config = config
        pixels = channels * config.patch_size**2
        self.conv_in = nn.Linear(pixels, config.dim)  # a 1x1 convolution, kept as the matrix it is
        self.cond_proj = nn.Linear(cond_dim, config.dim)
        self.blocks = nn.ModuleList(VelocityBlock(config) for _ in range(config.depth))
        self.conv_out = nn.Linear(config.dim, pixels)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        """Velocity at `x`, (B, C, H, W).

        Args:
            x: noisy data, (B, C, H, W).
            time: shifted time t in [0, 1], (B,).
            cond: condition tokens of one group, (B, S, cond_dim).
        """
        return self.with_features(x, time, cond)[0]

    def with_features(
        self, x: Tensor, time: Tensor, cond: Tensor, cond_mask: Tensor | None = None, layer: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The velocity, and the patch vectors (B, T, D) on entry of block `layer` (the last block by default).

        `cond_mask` (B, S) is False for condition tokens that only fill up a smaller group.
        """
        side = self.config.patch_size
        grid = (x.shape[2] // side, x.shape[3] // side)
        y = self.conv_in(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=side, q=side))
        rows, columns = torch.meshgrid(*(torch.arange(n, device=x.device) for n in grid), indexing="ij")
        table = rotary_table(torch.stack([rows, columns], -1).flatten(0, 1)[None], self.config.head_dim)
        sinusoid = time_sinusoid(time, self.config.dim).to(y.dtype)
        cond = plain_norm(self.cond_proj(cond))
        heard = Allowed(mask=None if cond_mask is None else cond_mask[:, None, None])
        features = y
        for number, block in enumerate(self.blocks):
            features = y if layer is None or number == layer else features
            y = block(y, sinusoid, cond, heard, table)
        y = self.conv_out(plain_norm(y)).float()
        return rearrange(y, "b (h w) (c p q) -> b c (h p) (w q)", h=grid[0], p=side, q=side), features
