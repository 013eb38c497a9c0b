from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vision_ar.data import images
from vision_ar.data.images import Digits, ImageFolder, Parquet

FirstBatch = Callable[..., dict[str, Tensor]]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_hold_images_in_the_unit_range_and_labels(first_batch: FirstBatch, channels: int) -> None:
    batch = first_batch(Digits(image_size=16, batch_size=32, channels=channels))
    assert set(batch) == {"images", "labels"}
    assert batch["images"].shape == (32, channels, 16, 16) and batch["images"].dtype == torch.float32
    assert batch["labels"].shape == (32,) and batch["labels"].dtype == torch.int64
    assert batch["images"].min() == -1 and 0.9 < batch["images"].max() <= 1


def test_digits_are_1500_and_297_of_ten_classes_with_exact_pixels(first_batch: FirstBatch) -> None:
    from sklearn.datasets import load_digits

    data = Digits(image_size=8, channels=1, batch_size=2000)
    train, val = first_batch(data), first_batch(data, "val")
    assert len(train["labels"]) == 1500 and len(val["labels"]) == 297
    assert data.class_names == [str(digit) for digit in range(10)] and data.num_classes == 10
    assert set(val["labels"].tolist()) == set(range(10))
    wanted = torch.tensor(load_digits().images[1500:]) * (255 / 16)
    torch.testing.assert_close((val["images"][:, 0] + 1) * 127.5, wanted.round().float(), atol=1e-4, rtol=0)


def test_every_image_is_seen_once_per_epoch_and_epochs_differ() -> None:
    data = Digits(image_size=8, batch_size=128)
    data.setup("fit")
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        epochs.append(torch.cat([batch["images"].flatten(1) for batch in loader]))
    assert not torch.equal(*epochs)
    assert sorted(map(hash, map(bytes, epochs[0].numpy()))) == sorted(map(hash, map(bytes, epochs[1].numpy())))


def test_drop_last_leaves_out_the_small_batch_of_training_only() -> None:
    data = Digits(image_size=8, batch_size=200, drop_last=True)
    data.setup("fit")
    assert [len(batch["labels"]) for batch in data.train_dataloader()] == [200] * 7
    assert [len(batch["labels"]) for batch in data.val_dataloader()] == [200, 97]


def test_loading_leaves_the_global_random_state_alone() -> None:
    data = Digits(image_size=8, flip=True, crop="random")
    data.setup("fit")
    before = torch.get_rng_state()
    assert len(list(data.train_dataloader())) == 24
    assert torch.equal(torch.get_rng_state(), before)


def test_images_in_memory_are_delivered_fast() -> None:
    data = Digits(image_size=32, batch_size=128, flip=True)
    data.setup("fit")
    loader = data.train_dataloader()
    start = time.perf_counter()
    count = sum(len(batch["labels"]) for _ in range(4) for batch in loader)
    assert count / (time.perf_counter() - start) > 5000


@pytest.mark.parametrize(
    ("name", "kind", "classes", "shape"),
    [("caltech101_64", "val", 99, (780, 3, 64, 64)), ("flowers128", "val", 5, (736, 3, 128, 128))],
)
def test_real_parquet_sets_load(
    shared_data: Callable[[str], str], name: str, kind: str, classes: int, shape: tuple[int, ...]
) -> None:
    data = Parquet(root=shared_data(name), image_size=shape[-1], batch_size=1000)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    assert batch["images"].shape == shape and data.num_classes == classes and data.bad_images == []
    assert 0 <= batch["labels"].min() and batch["labels"].max() < classes


def test_flipped_training_images_are_mirrored_about_half_of_the_time(first_batch: FirstBatch) -> None:
    plain, flipped = (first_batch(Digits(image_size=8, batch_size=1500, flip=flip))["images"] for flip in (False, True))
    changed = (plain != flipped).flatten(1).any(1)
    assert torch.equal(flipped[changed], plain[changed].flip(-1))
    assert 600 < changed.sum() < 900  # a few digits are symmetric; 1500 fair draws stay in there but once in 10**14


def test_validation_images_are_plain_whatever_the_training_views(first_batch: FirstBatch) -> None:
    plain, varied = (
        first_batch(Digits(image_size=8, **views), "val") for views in ({}, {"flip": True, "crop": "random"})
    )
    assert torch.equal(plain["images"], varied["images"])


def test_views_of_a_sample_depend_on_seed_and_epoch_alone() -> None:
    def view(seed: int, epoch: int, batch_size: int) -> Tensor:
        data = Digits(image_size=8, flip=True, crop="random", seed=seed, batch_size=batch_size)
        data.setup("fit")
        keys = [epoch * 1500 + index for index in (3, 700, 8)]
        return data.train_dataloader().dataset.__getitems__(keys)[0]["images"]

    assert torch.equal(view(0, 1, 4), view(0, 1, 9))
    assert not torch.equal(view(0, 1, 4), view(0, 2, 4)) and not torch.equal(view(0, 1, 4), view(1, 1, 4))


def test_images_read_one_by_one_equal_images_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def batches() -> list[Tensor]:
        data = ImageFolder(root=str(folder), image_size=8, batch_size=4, flip=True, crop="random")
        data.setup("fit")
        return [batch["images"] for batch in data.train_dataloader()]

    in_memory = batches()
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    assert all(torch.equal(a, b) for a, b in zip(in_memory, batches(), strict=True))


def test_worker_processes_give_the_same_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    (folder / "cat" / "0.png").write_bytes(b"no image")
    results = []
    for num_workers in (0, 1):
        data = ImageFolder(root=str(folder), image_size=8, batch_size=4, flip=True, num_workers=num_workers)
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(3)  # type: ignore[attr-defined]
        results.append([batch["images"] for batch in loader])
        list(data.val_dataloader())
        assert [path for path, _ in data.bad_images] == [str(folder / "cat" / "0.png")]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"crop": "left"}, "crop must be center or random, got 'left'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(**arguments)


def test_val_share_must_leave_both_splits_something() -> None:
    with pytest.raises(ValueError, match="val_share must be between 0 and 1, got 1"):
        ImageFolder(root="here", val_share=1)


def test_batch_larger_than_the_set_is_refused_when_it_would_be_dropped() -> None:
    data = Digits(image_size=8, batch_size=2000, drop_last=True)
    data.setup("fit")
    with pytest.raises(ValueError, match="batch_size must be at most 1500 with drop_last and this set, got 2000"):
        data.train_dataloader()


def test_cached_codes_need_a_folder() -> None:
    with pytest.raises(RuntimeError, match="codes must be set to read cached codes"):
        Digits().cached_codes("train")
