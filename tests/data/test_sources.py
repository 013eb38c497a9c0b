from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor

from vision_ar.data import images
from vision_ar.data.images import ImageFolder, Parquet, Torchvision

FirstBatch = Callable[..., dict[str, Tensor]]
pytestmark = pytest.mark.filterwarnings("ignore")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, labels: list[Any], names: list[str] | None, data: bytes | None = None) -> None:
    rows = [
        {"bytes": data or png(np.full((8, 8, 3), row, np.uint8)), "path": f"{row}.png"} for row in range(len(labels))
    ]
    table = pa.table({"image": rows, "label": pa.array(labels, pa.int64())})
    feature = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(feature)} if names else None), path)


def test_bad_images_are_reported_once_and_left_out(
    first_batch: FirstBatch, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "cat" / "0.png").write_text("this is text")
    whole = (folder / "dog" / "1.png").read_bytes()
    (folder / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        data = ImageFolder(root=str(folder), image_size=8, batch_size=20)
        seen = len(first_batch(data)["labels"]) + len(first_batch(data, "val")["labels"])
    assert seen == 10
    reasons = dict(data.bad_images)
    assert set(reasons) == {str(folder / "cat" / "0.png"), str(folder / "dog" / "1.png")}
    assert "not an image" in reasons[str(folder / "cat" / "0.png")]
    assert "truncated" in reasons[str(folder / "dog" / "1.png")]
    assert [record.getMessage().count("bad image") for record in caplog.records] == [1, 1]


def test_next_good_image_stands_in_for_a_bad_one(
    first_batch: FirstBatch, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(images, "split_files", lambda files, *_: {"train": files, "val": files})
    good = first_batch(ImageFolder(root=str(folder), image_size=8, batch_size=12), "val")["images"]
    for number in (4, 5):
        (folder / "dog" / f"{number}.png").write_bytes(b"")
    data = ImageFolder(root=str(folder), image_size=8, batch_size=12)
    batch = first_batch(data, "val")
    assert torch.equal(batch["images"][:10], good[:10])
    assert torch.equal(batch["images"][10:], good[:1].expand(2, -1, -1, -1))
    assert batch["labels"].tolist() == [0] * 6 + [1] * 4 + [0, 0]
    assert len(list(data.val_dataloader())) == 1 and len(data.bad_images) == 2


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_set_without_a_good_image_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(images, "MEMORY_LIMIT", limit)
    for path in folder.rglob("*.png"):
        path.write_text("text")
    with pytest.raises(ValueError, match="must have an image that can be read, got 11 bad ones; the first is .*png"):
        ImageFolder(root=str(folder), image_size=8, val_share=0.05).setup("fit")


# Folders


def test_folder_is_split_by_file_names_alone(folder: Path) -> None:
    def files(split: str, seed: int) -> set[str]:
        source = ImageFolder(root=str(folder), val_share=0.25, seed=seed).source(split)
        return {source.where(index) for index in range(len(source))}

    assert files("val", 0) == files("val", 1) and len(files("val", 0)) == 3
    assert files("train", 0) | files("val", 0) == {str(path) for path in folder.rglob("*.png")}
    assert not files("train", 0) & files("val", 0)


def test_train_and_val_folders_are_used(folder: Path, tmp_path: Path) -> None:
    for split, number in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            target = tmp_path / "both" / split / name
            target.mkdir(parents=True)
            for file in sorted((folder / name).iterdir())[:number]:
                (target / file.name).write_bytes(file.read_bytes())
    data = ImageFolder(root=str(tmp_path / "both"), image_size=8)
    assert (len(data.source("train")), len(data.source("val"))) == (12, 4)
    assert data.class_names == ["cat", "dog"]
    (tmp_path / "both" / "val" / "cat").rename(tmp_path / "both" / "val" / "cow")
    with pytest.raises(ValueError, match="must have the classes of .*train, got also cow"):
        data.setup("fit")


def test_missing_folder_is_an_error_with_advice(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="root must be a folder, got .*nowhere; make it and put images in"):
        ImageFolder(root=str(tmp_path / "nowhere")).setup("fit")


def test_folder_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="must have class sub-folders with images, got none; put files in .*<class>/"):
        ImageFolder(root=str(tmp_path)).setup("fit")


def test_single_image_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "cat" / "a.png")
    with pytest.raises(ValueError, match="must hold at least 2 images .* got 1"):
        ImageFolder(root=str(tmp_path)).setup("fit")


def test_train_folder_without_val_is_an_error(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "train")
    with pytest.raises(ValueError, match="must have both train and val, got only train"):
        ImageFolder(root=str(tmp_path)).setup("fit")


# Parquet


def test_parquet_labels_are_named_by_its_metadata(first_batch: FirstBatch, tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1, 1], ["ant", "bee", "cow"])
    write_parquet(tmp_path / "test-0.parquet", [2], ["ant", "bee", "cow"])
    data = Parquet(root=str(tmp_path), image_size=8)
    assert data.class_names == ["ant", "bee", "cow"]
    assert sorted(first_batch(data)["labels"].tolist()) == [0, 1, 1]
    assert first_batch(data, "val")["labels"].tolist() == [2]


def test_parquet_classes_without_names_are_numbers(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 3], None)
    write_parquet(tmp_path / "test-0.parquet", [1], None)
    assert Parquet(root=str(tmp_path)).class_names == ["0", "1", "2", "3"]


@pytest.mark.parametrize("label", [-1, 2, None])
def test_parquet_label_out_of_range_names_the_row(tmp_path: Path, label: int | None) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1, label], ["ant", "bee"])
    with pytest.raises(ValueError, match=f"label of row 2 of .*train-0.parquet must be between 0 and 1, got {label}"):
        Parquet(root=str(tmp_path)).setup("fit")


def test_parquet_rows_without_a_good_image_are_reported(first_batch: FirstBatch, tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1], ["ant", "bee"])
    write_parquet(tmp_path / "train-1.parquet", [1], ["ant", "bee"], data=b"text")
    write_parquet(tmp_path / "validation-0.parquet", [0], ["ant", "bee"])
    data = Parquet(root=str(tmp_path), image_size=8)
    assert len(first_batch(data)["labels"]) == 2
    assert data.bad_images == [(f"row 2 of {tmp_path}/train (0.png)", "not an image that Pillow can read")]


def test_parquet_without_its_columns_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"img": [1], "label": [0]}), tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match="must have columns image: .* got img: int64, label: int64"):
        Parquet(root=str(tmp_path)).setup("fit")


def test_parquet_without_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must hold train-.*parquet, got no such file; check root"):
        Parquet(root=str(tmp_path)).setup("fit")


def test_missing_package_is_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0], ["ant"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match="needs pyarrow, which is not installed; run: pip install pyarrow"):
        Parquet(root=str(tmp_path)).source("train")


# Torchvision


class FakeSet:
    """Stands in for a torchvision set with a split option."""

    def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
        if split not in ("trainval", "test"):
            raise ValueError(f"Unknown value {split!r} for argument split.")
        if root == "offline":
            raise URLError("no route to host")
        self.count = 6 if split == "trainval" else 2

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (8, 8), (index, 0, 0)), index % 3


def test_torchvision_sets_are_found_by_name(first_batch: FirstBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "FakeSet", FakeSet, raising=False)
    data = Torchvision(name="FakeSet", root="here", image_size=8)
    data.prepare_data()
    assert len(first_batch(data)["labels"]) == 6 and len(first_batch(data, "val")["labels"]) == 2
    assert data.num_classes >= 2


def test_torchvision_without_network_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "FakeSet", FakeSet, raising=False)
    with pytest.raises(ConnectionError, match="FakeSet is not in offline and cannot be downloaded .*no route to host"):
        Torchvision(name="FakeSet", root="offline").prepare_data()


@pytest.mark.parametrize(
    ("name", "reason"), [("CIFAR11", "must be that of a torchvision data set"), ("Caltech101", "train or split option")]
)
def test_unknown_torchvision_sets_are_refused(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"name .*{reason}.* got '{name}'"):
        Torchvision(name=name).prepare_data()
