"""Features on disk: the same however the work is shared or interrupted, done once, and never taken for others."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vision_ar.evaluation.arrays import ArrayFolder
from vision_ar.evaluation.extractors import Extractor, Features, load_extractor
from vision_ar.evaluation.features import FeatureStore
from vision_ar.evaluation.image_files import open_images

torch.set_num_threads(1)

COUNT, BATCH = 23, 4  # the last of six batches has three images


@pytest.fixture(scope="module")
def cifar10() -> Extractor:
    return load_extractor("cifar10")


class Watched:
    """An extractor that notes the images it is given, fails at one of its calls, and has other attributes."""

    def __init__(self, extractor: Extractor, fail_at: int | None = None, change: Any = None, **others: Any) -> None:
        self.extractor, self.fail_at, self.change, self.seen = extractor, fail_at, change, list[Tensor]()
        self.__dict__.update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.extractor, name)

    def __call__(self, pixels: Tensor) -> Features:
        if len(self.seen) == self.fail_at:
            raise KeyboardInterrupt
        self.seen.append(pixels)
        found = self.extractor(pixels)
        if self.change is not None:
            self.change(found)
        return found


def noise(count: int = COUNT, seed: int = 0, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, 32, 32), dtype=torch.uint8, generator=generator)


def write(path: Path, pixels: Tensor) -> Path:
    """Save as an .npy, or compressed as an .npz, which can only be read from its start."""
    path.parent.mkdir(exist_ok=True)
    (np.save if path.suffix == ".npy" else np.savez_compressed)(path, pixels.permute(0, 2, 3, 1).contiguous().numpy())
    return path


@pytest.fixture(params=["npy", "npz"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path / f"images.{request.param}", noise())


def store_in(folder: Path, path: Path, extractor: Any, batch_size: int = BATCH) -> FeatureStore:
    store = FeatureStore(folder, open_images(path), extractor, batch_size)
    store.prepare()
    return store


def content(store: FeatureStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.arrays.folder.glob("*.npy")}


@pytest.fixture
def whole(path: Path, tmp_path: Path, cifar10: Extractor) -> FeatureStore:
    store = store_in(tmp_path / "whole", path, cifar10)
    store.fill()
    return store


def test_rows_are_what_the_extractor_says_about_their_image(whole: FeatureStore, cifar10: Extractor) -> None:
    for name in ("features", "logits"):
        expected = getattr(cifar10(noise()), name).numpy()
        np.testing.assert_allclose(getattr(whole, name), expected, rtol=1e-4, atol=1e-4)
    assert whole.features.shape == (COUNT, 192) and whole.logits.shape == (COUNT, 10)
    assert whole.features.dtype == whole.logits.dtype == np.float32 and isinstance(whole.features, np.memmap)
    assert whole.arrays.complete and not (whole.arrays.folder / "spatial.npy").exists()


@pytest.mark.parametrize("ranks", [(0, 1, 2), (2, 0, 1), tuple(range(8))])
def test_shares_of_several_processes_make_the_features_of_one(
    whole: FeatureStore, path: Path, tmp_path: Path, cifar10: Extractor, ranks: tuple[int, ...]
) -> None:
    extractor, advanced = Watched(cifar10), list[int]()
    store = store_in(tmp_path / "shared", path, extractor)
    for rank in ranks:
        assert not store.arrays.complete
        store.fill(rank, len(ranks), advanced.append)
    assert content(store) == content(whole) and store.arrays.complete
    assert sum(advanced) == COUNT and len(extractor.seen) == 6


@pytest.mark.parametrize("done_first", [0, 1, 5])
def test_interrupted_work_goes_on_where_it_stopped(
    whole: FeatureStore, path: Path, tmp_path: Path, cifar10: Extractor, done_first: int
) -> None:
    broken = store_in(tmp_path / "broken", path, Watched(cifar10, fail_at=done_first))
    with pytest.raises(KeyboardInterrupt):
        broken.fill()
    rest, advanced = Watched(cifar10), list[int]()
    second = store_in(tmp_path / "broken", path, rest, batch_size=7)  # a folder keeps the batch size it was begun with
    second.fill(advance=advanced.append)
    assert content(second) == content(whole)
    assert torch.equal(torch.cat(rest.seen), noise()[done_first * BATCH :])
    assert advanced == [4, 4, 4, 4, 4, 3][done_first:]
    store_in(tmp_path / "broken", path, Watched(cifar10, fail_at=0)).fill()  # which would raise if work were left


def test_gaps_between_finished_batches_are_filled_with_the_images_that_belong_there(
    whole: FeatureStore, path: Path, tmp_path: Path, cifar10: Extractor
) -> None:
    first, rest = Watched(cifar10), Watched(cifar10)
    store_in(tmp_path / "gaps", path, first).fill(1, 3)  # batches 2 and 3
    second = store_in(tmp_path / "gaps", path, rest)
    second.fill()
    assert torch.equal(torch.cat(first.seen), noise()[8:16])
    assert torch.equal(torch.cat(rest.seen), torch.cat([noise()[:8], noise()[16:]]))
    assert content(second) == content(whole)


def test_the_digest_is_that_of_the_pixels_whatever_file_they_came_in(whole: FeatureStore, tmp_path: Path) -> None:
    assert whole.digest() == whole.pixels.digest()
    changed = noise()
    changed[-1, -1, -1, -1] ^= 1
    for pixels, same in ((noise(), True), (changed, False), (noise()[:-1], False), (noise().flip(0), False)):
        assert (open_images(write(tmp_path / "other.npy", pixels)).digest() == whole.digest()) == same


def test_statistics_say_what_they_are_of(whole: FeatureStore, cifar10: Extractor) -> None:
    found = whole.statistics(split="val")
    covariance = np.cov(np.asarray(whole.features, np.float64), rowvar=False)
    np.testing.assert_allclose(found.moments.covariance, covariance, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(np.asarray(found.features), whole.features)
    assert found.about == {
        "images": whole.digest(), "extractor": "cifar10", "weights": cifar10.digest, "count": COUNT,
        "height": 32, "width": 32, "channels": 3, "split": "val",
    }  # fmt: skip
    assert (found.name, found.digest, found.spatial) == (whole.pixels.name, whole.digest(), None)


def test_statistics_of_an_unfinished_set_are_refused(path: Path, tmp_path: Path, cifar10: Extractor) -> None:
    store = store_in(tmp_path / "part", path, cifar10)
    store.fill(0, 3)
    with pytest.raises(RuntimeError, match="must be complete"):
        store.statistics()


def test_a_folder_of_something_else_is_refused_with_what_differs(
    whole: FeatureStore, path: Path, tmp_path: Path, cifar10: Extractor
) -> None:
    before, none = content(whole), "0" * 16
    other = write(tmp_path / "other.npy", noise())
    for images, extractor, message in (
        (other, cifar10, f"images {path}.*, got {other}.*"),
        (path, Watched(cifar10, name="pets"), "extractor cifar10, got pets"),
        (path, Watched(cifar10, digest=none), f"weights {cifar10.digest}, got {none}"),
        (write(tmp_path / "more" / path.name, noise(COUNT + 1)), cifar10, f"images {path}.*, got {path}.*"),
        (write(tmp_path / "grey" / path.name, noise(channels=1)), cifar10, f"images {path}.*, got {path}.*"),
    ):
        if images.parent != tmp_path:
            images = images.replace(path)
        with pytest.raises(ValueError, match=f"whole was begun with {message}; choose another folder, or delete this"):
            store_in(tmp_path / "whole", images, extractor)
    assert content(whole) == before


def test_features_are_never_those_of_older_images_under_the_same_name(
    whole: FeatureStore, path: Path, tmp_path: Path, cifar10: Extractor
) -> None:
    write(path, noise(seed=1))
    with suppress(ValueError):  # to refuse the folder is as good as to read the new images
        again = store_in(tmp_path / "whole", path, cifar10)
        again.fill()
        assert again.digest() == again.pixels.digest()


@pytest.mark.parametrize("name", ["features", "logits"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_and_not_kept(
    path: Path, tmp_path: Path, cifar10: Extractor, name: str, value: float
) -> None:
    def spoil(found: Features) -> None:
        setattr(found, name, getattr(found, name).clone())
        getattr(found, name)[-1, 0] = value

    store = store_in(tmp_path / "spoilt", path, Watched(cifar10, change=spoil))
    with pytest.raises(ValueError, match=rf"{name} of .*images\.np. must be finite, got others; check the extractor"):
        store.fill()
    assert not store.arrays.open("done").any()


def test_grey_images_and_spatial_features_are_kept_too(tmp_path: Path, cifar10: Extractor) -> None:
    def add(found: Features) -> None:
        found.spatial = found.features[:, :5] + 1

    path = write(tmp_path / "grey.npy", noise(channels=1))
    store = store_in(tmp_path / "spatial", path, Watched(cifar10, change=add, spatial_dim=5))
    store.fill()
    np.testing.assert_allclose(store.features, cifar10(noise(channels=1)).features.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(store.arrays.open("spatial"), store.features[:, :5] + 1)
    spatial: Any = store.statistics().spatial
    np.testing.assert_allclose(spatial.mean, np.asarray(store.features[:, :5] + 1, np.float64).mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize(("count", "size"), [(1, 4), (8, 4), (23, 4), (23, 100), (7, 1)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 10])
def test_batches_of_all_processes_cover_every_row_once(tmp_path: Path, count: int, size: int, world_size: int) -> None:
    arrays = ArrayFolder(tmp_path / "rows")
    arrays.prepare({"of": "nothing"}, count, size, {"rows": ((2,), np.int32)})
    rows = list[int]()
    for rank in range(world_size):
        for start, stop, done in arrays.batches(rank, world_size):
            assert 0 < stop - start <= size and not done
            arrays.write(start, {"rows": np.array([[row, rank] for row in range(start, stop)])})
            rows += range(start, stop)
    assert rows == list(range(count)) and arrays.complete
    np.testing.assert_array_equal(arrays.open("rows")[:, 0], np.arange(count))


def test_a_folder_is_prepared_again_without_loss_and_anew_when_it_was_left_half_made(tmp_path: Path) -> None:
    arrays, layout = ArrayFolder(tmp_path / "rows"), {"rows": ((), np.int32)}
    arrays.prepare({"of": "a", "sizes": (1, 2)}, 5, 2, layout)
    arrays.write(2, {"rows": np.array([7, 8])})
    arrays.prepare({"of": "a", "sizes": (1, 2)}, 5, 3, layout)
    assert arrays.open("rows").tolist() == [0, 0, 7, 8, 0] and arrays.open("done").tolist() == [0, 1, 0]
    assert arrays.about() == {"of": "a", "sizes": [1, 2], "count": 5, "batch_size": 2}
    for of, count, size, message in (("b", 5, 2, "of a, got b"), ("a", 4, 2, "count 5, got 4"), ("a", 5, 0, "got 0")):
        with pytest.raises(ValueError, match=f"rows was begun with {message}|batch_size must be at least 1, {message}"):
            arrays.prepare({"of": of, "sizes": (1, 2)}, count, size, layout)
    record = tmp_path / "rows" / "about.json"
    record.write_text("{")
    with pytest.raises(ValueError, match=r"about\.json must be JSON, got: .*; delete .*rows$"):
        arrays.prepare({"of": "a"}, 5, 2, layout)
    record.unlink()  # as if the process had ended before: it is written last
    assert not arrays.complete
    arrays.prepare({"of": "b"}, 3, 2, layout)
    assert arrays.open("rows").tolist() == [0, 0, 0] and not arrays.open("done").any()
