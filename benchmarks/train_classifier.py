"""Train the classifier whose features judge 32x32 images: python -m benchmarks.train_classifier --data DIR --out FILE.

DIR holds `train-*.parquet` and `test-*.parquet` with columns image = struct(bytes, path) and label. The learning rate
follows the clock, so that a run ends with the minutes that it was given; runs are therefore not exactly repeatable.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vision_ar.data.pixels import flip_some, normalise
from vision_ar.data.sources import ParquetSource, parquet_class_names
from vision_ar.layers.classifier import IMAGE_SIZE, SmallClassifier, load_classifier, save_classifier
from vision_ar.training.precision import cpu_has_bfloat16

PAD = 4
WARM_UP = 0.2


def main() -> None:
    """Train, save in half precision, and print the test accuracy before and after the weights are rounded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train-*.parquet and test-*.parquet")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--minutes", type=float, default=20, help="of training")
    parser.add_argument("--batch_size", type=int, default=256, help="images in a step")
    parser.add_argument("--lr", type=float, default=0.2, help="largest learning rate")
    parser.add_argument("--weight_decay", type=float, default=5e-4, help="of all weights")
    parser.add_argument("--label_smoothing", type=float, default=0.1, help="share of the target for all classes")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of them")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--threads", type=int, default=1, help="CPU cores to use")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    pixels, labels, class_names = load_split(args.data, "train")
    test_pixels, test_labels, _ = load_split(args.data, "test")
    classifier = SmallClassifier(class_names).to(memory_format=torch.channels_last)
    whiten_stem(classifier, normalise(pixels[:5000]))
    train(classifier, pixels, labels, args)

    classifier.eval()
    trained = measure_accuracy(classifier, test_pixels, test_labels)
    save_classifier(classifier, args.out)
    rounded = load_classifier(args.out)
    rounded.accuracy = measure_accuracy(rounded, test_pixels, test_labels)
    save_classifier(rounded, args.out)
    print(f"test accuracy {trained:.4f}, with the saved weights {rounded.accuracy:.4f}, {args.out}")


def load_split(folder: Path, split: str) -> tuple[Tensor, Tensor, list[str]]:
    """Pixels (N, 3, 32, 32), uint8, labels (N,) and class names of one split."""
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} must hold {split}-*.parquet, got none")
    class_names = parquet_class_names(files)
    source = ParquetSource(files, class_names)
    pixels, labels = zip(*(source.square(row, IMAGE_SIZE, 3) for row in range(len(source))), strict=True)
    return torch.stack(pixels), torch.tensor(labels), class_names


@torch.no_grad()
def whiten_stem(classifier: SmallClassifier, images: Tensor) -> None:
    """Make the first filters, in pairs of opposite sign, the whitened principal components of 2x2 patches.

    Source:
        Jordan 2024, section 3.1; the filters stay trainable.
    """
    patches = F.unfold(images, classifier.stem.kernel_size).transpose(1, 2).flatten(0, 1)
    variances, directions = torch.linalg.eigh(torch.cov(patches.T.double()))
    filters = (directions / (variances + 5e-4).sqrt()).T.float().unflatten(1, classifier.stem.weight.shape[1:])
    pairs = torch.cat([filters, -filters])[: classifier.stem_dim]
    classifier.stem.weight[: len(pairs)] = pairs


def train(classifier: SmallClassifier, pixels: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """Run SGD until the minutes are over, with a learning rate that rises and falls linearly."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.SGD(
        classifier.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, nesterov=True
    )
    start, mean_loss = time.monotonic(), 0.0
    for step, rows in enumerate(random_rows(len(labels), args.batch_size, generator)):
        progress = (time.monotonic() - start) / (60 * args.minutes)
        if progress >= 1:
            break
        optimizer.param_groups[0]["lr"] = args.lr * min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))
        images = augment(pixels[rows], generator, args.flip)
        # bfloat16 convolutions take half the time of float32 on a CPU that has them; losses stay float32
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16()):
            logits = classifier(images)
        loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=args.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean_loss += 0.02 * (loss.item() - mean_loss)
        if step % 100 == 0:
            epochs = step * args.batch_size / len(labels)
            print(f"step {step}, epoch {epochs:.2f}, {progress:.0%} of the time, loss {mean_loss:.3f}", flush=True)
    print(f"{step} steps of {args.batch_size} images")


def random_rows(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Full batches of row numbers in a new order every epoch, without an end."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % batch_size].split(batch_size)


def augment(pixels: Tensor, generator: torch.Generator, flip: bool) -> Tensor:
    """Mirror half of the pictures if asked to and shift each by up to 4 pixels, as images in [-1, 1]."""
    count, _, height, width = pixels.shape
    images = normalise(pixels)
    if flip:
        images = flip_some(images, torch.rand(count, generator=generator))
    padded = F.pad(images, (PAD,) * 4, mode="reflect")
    top, left = torch.randint(2 * PAD + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return picked.permute(0, 3, 1, 2)


@torch.no_grad()
def measure_accuracy(classifier: SmallClassifier, pixels: Tensor, labels: Tensor) -> float:
    """Share of pictures that get their own class."""
    batches = zip(pixels.split(500), labels.split(500), strict=True)
    hits = sum(int((classifier(normalise(part)).argmax(1) == wanted).sum()) for part, wanted in batches)
    return hits / len(labels)


if __name__ == "__main__":
    main()
