"""How likely a model holds the tokens of images that it never saw."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vision_ar.data.pixels import normalise
from vision_ar.evaluation.arrays import ArrayFolder
from vision_ar.evaluation.features import HASH_BYTES
from vision_ar.evaluation.image_files import digest_of, image_hashes
from vision_ar.evaluation.protocols import Protocol
from vision_ar.evaluation.references import DataPixels
from vision_ar.generator import Generator
from vision_ar.interfaces import ImageTokenizer, Tokens, readout_losses
from vision_ar.pipeline import Pipeline


def token_nats(generator: Generator, tokens: Tokens) -> Tensor:
    """Measure -log p of every token given the condition and what the model has before it, (B, T), float32.

    The sum of a row is the negative log-likelihood of its sequence. Tokens that are given or padded count 0.

    Args:
        generator: in evaluation mode.
        tokens: discrete, with their condition.

    Raises:
        ValueError: if the objective has no likelihood, as that of a masked model.
    """
    plan = generator.objective.likelihood(tokens)
    if plan is None:
        raise ValueError(f"model must have a likelihood, the objective {type(generator.objective).__name__} has none")
    nats = torch.zeros(tokens.batch_size, tokens.seq_len, device=tokens.group.device)
    for readout, loss in readout_losses(generator.backbone, generator.heads, plan):  # type: ignore[arg-type]
        nats.index_put_(tuple(readout.of.unbind(-1)), loss, accumulate=True)
    return nats


class LikelihoodStore:
    """Likelihoods of the tokens of a set of images, in a folder; see `ArrayFolder`.

    Args:
        folder: made when it is missing.
        pipe: the model.
        originals: the images.
        protocol: says which they are.
        batch_size: images at a time.

    Raises:
        ValueError: if the model does not read such images, or has other classes.
    """

    def __init__(
        self, folder: str | Path, pipe: Pipeline, originals: DataPixels, protocol: Protocol, batch_size: int = 64
    ) -> None:
        self.arrays, self.pipe, self.originals, self.protocol = ArrayFolder(folder), pipe, originals, protocol
        self.batch_size = batch_size
        if pipe.num_classes not in (0, originals.num_classes):
            raise ValueError(
                f"data must have {pipe.num_classes} classes, as the model has, got {originals.num_classes} "
                f"in {originals.name}"
            )

    def prepare(self) -> None:
        """Make the folder, or check that it was begun for the same images and model; by one process only."""
        about = {"model": self.pipe.name, "hash": self.pipe.digest, "protocol": self.protocol.name}
        about |= {"images": f"{self.originals.name} in state {self.originals.identity()}"}
        about |= self.pipe.weights()
        layout = {"nats": ((), np.float64), "hashes": ((HASH_BYTES,), np.uint8)}
        self.arrays.prepare(about, self.originals.count, self.batch_size, layout)

    @torch.inference_mode()
    def fill(self, rank: int = 0, world_size: int = 1, advance: Callable[[int], Any] = lambda count: None) -> None:
        """Measure this process's share of what is missing; `advance` as in `FeatureStore.fill`."""
        tokenizer = self.pipe.tokenizer
        assert isinstance(tokenizer, ImageTokenizer)
        device = next(self.pipe.generator.parameters()).device
        for start, stop, done in self.arrays.batches(rank, world_size):
            if not done:
                pixels, classes = self.originals.labelled(start, stop)
                labels = classes.to(device) if self.pipe.num_classes else None
                tokens = tokenizer.encode(normalise(pixels.to(device)), labels)
                nats = token_nats(self.pipe.generator, tokens).double().sum(dim=1)
                self.arrays.write(start, {"nats": nats.cpu().numpy(), "hashes": image_hashes(pixels)})
                advance(stop - start)

    def digest(self) -> str:
        """Of all images, whatever files they came in; see `image_files.digest_of`."""
        images = self.originals
        return digest_of(self.arrays.open("hashes"), images.channels, images.height, images.width)

    def scores(self) -> dict[str, float]:
        """Mean over the images: nats of an image, bits of a token, bits of the tokens per pixel value.

        The last one is the rate of the code. It is bits per dimension of the images themselves only where the tokenizer
        loses nothing.
        """
        nats = np.asarray(self.arrays.open("nats"))
        bits, images = nats.mean() / math.log(2), self.originals
        return {
            "token_nats_per_image": float(nats.mean()),
            "token_nats_per_image_se": float(nats.std(ddof=1) / len(nats) ** 0.5) if len(nats) > 1 else math.nan,
            "bits_per_token": float(bits / self.pipe.tokenizer.spec.seq_len),
            "token_bits_per_dim": float(bits / (images.channels * images.height * images.width)),
        }
