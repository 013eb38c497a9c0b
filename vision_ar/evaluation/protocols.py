"""Protocols: everything that decides a score, under one name that a paper can cite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ADM_REFERENCE = "VIRTUAL_imagenet256_labeled.npz of the ADM evaluator: moments of the ImageNet training set"


@dataclass(frozen=True)
class Protocol:
    """How samples, or reconstructions, are made and judged.

    Args:
        name: as in a result.
        kind: generation, reconstruction or likelihood.
        num_samples: images that are scored.
        image_size: of the images when they are scored.
        extractor: inception, an in-domain one, or none for likelihoods.
        metrics: fid, sfid, is, kid, precision_recall, accuracy; for reconstructions also psnr, ssim, usage; bits.
        labels: uniform (drawn at random), balanced (every class equally often), or none where images are given.
        rounding: of images in [-1, 1] to pixels, see `round_pixels`; none where no image is made.
        resize: none (a model of another size is refused) or bicubic (of the images, before they are rounded).
        reference: what the samples are compared with, in words.
        split: of the data that is the reference when no file is given: train, val, or none where there must be one.
        channels: of the images.
        reference_digests: known digests of the reference and what each is; a result says which it was, or that it was
            none of them.
        closed: refuse a reference that is none of them: the set has no other edition.
        source: where the protocol is described.
    """

    name: str
    kind: str
    num_samples: int
    image_size: int
    extractor: str
    metrics: tuple[str, ...]
    labels: str
    rounding: str
    resize: str
    reference: str
    split: str
    source: str
    channels: int = 3
    reference_digests: tuple[tuple[str, str], ...] = ()
    closed: bool = False


def imagenet(name: str, labels: str, rounding: str, metrics: tuple[str, ...], resize: str, source: str) -> Protocol:
    """A protocol of 50,000 samples against the ADM reference."""
    return Protocol(
        name, "generation", 50000, 256, "inception", metrics, labels, rounding, resize, ADM_REFERENCE, "none", source
    )


@dataclass(frozen=True)
class DataSet:
    """A set that a protocol knows: its validation images in words, their sizes, and the digests of its editions."""

    images: str
    image_size: int
    channels: int
    digests: tuple[tuple[str, str], ...]
    closed: bool


CIFAR10 = DataSet(
    "the 10,000 test images of CIFAR-10", 32, 3,
    (("f7156d5563e1f4b3", "CIFAR-10 test images, JPEG edition of quality 75"),), False,
)  # fmt: skip
MNIST = DataSet("the 10,000 test images of MNIST", 28, 1, (("e01c8c098608a508", "MNIST test images"),), True)
FASHION_MNIST = DataSet(
    "the 10,000 test images of Fashion-MNIST", 28, 1, (("dba1a83173c038a3", "Fashion-MNIST test images"),), True
)
DIGITS = DataSet(
    "the 297 validation digits of scikit-learn: a trial run", 8, 1,
    (("df6cbe5b4188ff7a", "validation digits of scikit-learn"),), True,
)  # fmt: skip


def in_domain(name: str, extractor: str, num_samples: int, data: DataSet) -> Protocol:
    """A protocol of a small set: its own classifier, as many samples of every class, against the validation images."""
    own_classes = ("accuracy",) if extractor in name else ()
    metrics = ("fid", "kid", "precision_recall", *own_classes)
    return Protocol(
        name, "generation", num_samples, data.image_size, extractor, metrics, "balanced", "nearest", "none",
        data.images, "val", "this project", data.channels, data.digests, data.closed,
    )  # fmt: skip


def bits(name: str, num_images: int, data: DataSet) -> Protocol:
    """A protocol of likelihoods: the validation images of a set, as the data module cuts them."""
    return Protocol(
        name, "likelihood", num_images, data.image_size, "none", ("bits",), "none", "none", "none", data.images, "val",
        "this project", data.channels, data.digests, data.closed,
    )  # fmt: skip


ADM_METRICS = ("fid", "sfid", "is", "precision_recall")
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        imagenet(
            "adm-imagenet256", "uniform", "half_up", ADM_METRICS, "bicubic",
            "evaluator of Dhariwal & Nichol 2021; classes and rounding as LlamaGen and D-AR have them",
        ),
        imagenet(
            "var-imagenet256", "balanced", "truncate", ADM_METRICS, "none",
            "VAR: 50 images of every class, values in [0, 1] times 255, cut off",
        ),
        imagenet(
            "mar-imagenet256", "balanced", "nearest", ("fid", "is"), "none",
            "MAR: 50 images of every class, rounded, against the moments of the ADM reference",
        ),
        Protocol(
            "recon-val50k", "reconstruction", 50000, 256, "inception", ("fid", "is", "psnr", "ssim", "usage"), "none",
            "half_up", "none", "the 50,000 validation images themselves", "val", "LlamaGen and D-AR tokenizers, rFID",
        ),
        Protocol(
            "cifar10-train50k", "generation", 50000, 32, "inception", ("fid", "is", "kid", "precision_recall"),
            "balanced", "nearest", "none", "the 50,000 training images of CIFAR-10", "train",
            "the usual FID of CIFAR-10", 3,
            (("86d801122c6d78ef", "CIFAR-10 training images, JPEG edition of quality 75"),),
        ),
        Protocol(
            "recon-cifar10", "reconstruction", 10000, 32, "cifar10", ("fid", "psnr", "ssim", "usage"), "none",
            "nearest", "none", f"{CIFAR10.images} themselves", "val", "this project", 3, CIFAR10.digests,
        ),
        in_domain("cifar10", "cifar10", 10000, CIFAR10),
        in_domain("cifar10-fast", "cifar10", 2000, CIFAR10),
        in_domain("mnist", "mnist", 10000, MNIST),
        in_domain("fashion-mnist", "fashion-mnist", 10000, FASHION_MNIST),
        bits("bits-imagenet256", 50000, DataSet("the 50,000 validation images of ImageNet", 256, 3, (), False)),
        bits("bits-cifar10", 10000, CIFAR10),
        bits("bits-digits", 297, DIGITS),
        in_domain("digits-fast", "cifar10", 100, DIGITS),
    )
}  # fmt: skip


def find_protocol(name: str) -> Protocol:
    """The protocol of this name.

    Raises:
        ValueError: if there is none; the message lists all.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {name!r}")
    return PROTOCOLS[name]


def labels_for(rule: str, count: int, num_classes: int, seed: int) -> list[int]:
    """Class of every sample.

    Args:
        rule: uniform or balanced.
        count: number of samples N.
        num_classes: of the model.
        seed: of the uniform draw; sample i gets the same class however many there are.
    """
    if rule == "balanced":
        return [i % num_classes for i in range(count)]
    if rule == "uniform":
        draws = torch.Generator().manual_seed(seed)
        return torch.cat([torch.randint(num_classes, (1,), generator=draws) for _ in range(count)]).tolist()
    raise ValueError(f"labels must be uniform or balanced, got {rule!r}")


def round_pixels(images: Tensor, rounding: str) -> Tensor:
    """Images in [-1, 1], any shape, to uint8 pixels.

    Args:
        images: clamped first.
        rounding: nearest (MAR, this project), half_up (127.5 x + 128, cut off; DiT, LlamaGen, D-AR) or truncate
            (127.5 x + 127.5, cut off, half a level darker on average; the script of ADM, VAR).
    """
    shift = {"nearest": 127.5, "half_up": 128.0, "truncate": 127.5}
    if rounding not in shift:
        raise ValueError(f"rounding must be one of {', '.join(shift)}, got {rounding!r}")
    values = 127.5 * images.float().clamp(-1, 1) + shift[rounding]
    return (values.round() if rounding == "nearest" else values).clamp(0, 255).to(torch.uint8)


def fit_size(images: Tensor, size: int, resize: str) -> Tensor:
    """Images (B, C, size, size), resized when the protocol says how.

    Raises:
        ValueError: when it does not.
    """
    if images.shape[-2:] == (size, size):
        return images
    if resize == "bicubic":  # without antialiasing, as LlamaGen shrinks 384 to 256
        return F.interpolate(images, (size, size), mode="bicubic", align_corners=False)
    found = " x ".join(str(side) for side in images.shape[-2:])
    raise ValueError(f"the model must make images of {size} x {size} pixels for this protocol, got {found}")
