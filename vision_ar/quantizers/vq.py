"""Vector quantisation with unit-length vectors on both sides."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Quantized(NamedTuple):
    """What a quantizer returns for latents (B, T, C)."""

    quantized: Tensor
    """Codebook rows, (B, T, C); gradients pass straight through to the latents."""
    tokens: Tensor
    """Their ids, (B, T), int64."""
    codebook_loss: Tensor
    """Pulls codebook rows to latents, per token, (B, T)."""
    commitment_loss: Tensor
    """Pulls latents to codebook rows, per token, (B, T)."""


class VectorQuantizer(nn.Module):
    """Nearest codebook row by cosine; latents and rows are normalised at use, stored rows need not be.

    Args:
        codebook_size: number of rows K.
        latent_dim: width C.
        usage_window: a row counts as used when it occurred among this many last tokens.
        revive_every: every so many training batches, unused rows move to latents of the batch; 0 is never, as
            published. A short training leaves most of a codebook dead without it.

    Source:
        van den Oord et al. 2017; normalisation as in Yu et al. 2021 (ViT-VQGAN).
    """

    seen_tokens: Tensor
    last_used: Tensor

    def __init__(self, codebook_size: int, latent_dim: int, usage_window: int = 65536, revive_every: int = 0) -> None:
        super().__init__()
        self.usage_window, self.revive_every = usage_window, revive_every
        self.codebook = nn.Parameter(F.normalize(torch.randn(codebook_size, latent_dim), dim=-1))
        self.register_buffer("seen_tokens", torch.zeros(2, dtype=torch.int64))  # tokens, batches
        self.register_buffer("last_used", torch.full((codebook_size,), -1, dtype=torch.int64))

    def forward(self, latents: Tensor) -> Quantized:
        """Quantise latents (B, T, C) and give both losses, float32, unweighted."""
        latents = F.normalize(latents.float(), dim=-1)
        codebook = F.normalize(self.codebook.float(), dim=-1)
        kind = "cpu" if latents.is_meta else latents.device.type
        with torch.autocast(kind, enabled=False):  # a near-tie must not be decided by bf16
            tokens = (latents.detach() @ codebook.detach().T).argmax(dim=-1)
        quantized = codebook[tokens]
        codebook_loss = (quantized - latents.detach()).square().mean(dim=-1)
        commitment_loss = (quantized.detach() - latents).square().mean(dim=-1)
        straight = latents + (quantized - latents).detach()
        return Quantized(straight, tokens, codebook_loss, commitment_loss)

    def entropy_loss(self, latents: Tensor, temperature: float = 0.01) -> Tensor:
        """Entropy of each token's choice less the entropy of all choices together, a number; low is sure and varied.

        Source:
            MaskGIT's code, as LlamaGen has it, on the similarities of unit vectors.
        """
        similar = F.normalize(latents.float(), dim=-1).flatten(0, -2) @ F.normalize(self.codebook, dim=-1).T
        logprobs = (2 * similar / temperature).log_softmax(dim=-1)  # minus the squared distance, but for a constant
        probs, mean = logprobs.exp(), logprobs.exp().mean(dim=0)
        return -(probs * logprobs).sum(dim=-1).mean() + (mean * (mean + 1e-5).log()).sum()

    def lookup(self, tokens: Tensor) -> Tensor:
        """Codebook rows of tokens, (..., C), unit length."""
        return F.normalize(self.codebook[tokens].float(), dim=-1)

    @torch.no_grad()
    def track(self, tokens: Tensor, latents: Tensor) -> None:
        """Add a training batch to the usage statistics, and revive unused rows when it is time; never frozen ones.

        Args:
            tokens: ids of any shape.
            latents: what they were chosen for, the same shape and C.
        """
        self.seen_tokens += torch.tensor([tokens.numel(), 1], device=tokens.device)
        self.last_used[tokens.flatten()] = self.seen_tokens[0]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # used anywhere is used
            torch.distributed.all_reduce(self.last_used, torch.distributed.ReduceOp.MAX)
        if self.revive_every and self.codebook.requires_grad and int(self.seen_tokens[1]) % self.revive_every == 0:
            self._revive(latents.flatten(0, -2))

    def _revive(self, latents: Tensor) -> None:
        dead = (~self._used()).nonzero()[:, 0]
        # evenly spaced latents of the batch: no random numbers, so that a resumed run does the same
        chosen = torch.linspace(0, len(latents) - 1, len(dead), device=latents.device).long()
        self.codebook.data[dead] = F.normalize(latents[chosen].float(), dim=-1)
        self.last_used[dead] = self.seen_tokens[0]  # gets one window to prove itself
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(self.codebook.data, src=0)

    def _used(self) -> Tensor:
        return (self.last_used >= 0) & (self.seen_tokens[0] - self.last_used < self.usage_window)

    @torch.no_grad()
    def usage(self) -> float:
        """Share of the rows that occurred among the last `usage_window` tracked tokens, in [0, 1]."""
        return float(self._used().float().mean())
