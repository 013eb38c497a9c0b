from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision_ar.data.cache_codes import cache_codes, image_views, load_data, main
from vision_ar.data.codes import CachedCodes, CodesRecord, tokenizer_hash
from vision_ar.data.images import Digits, Parquet
from vision_ar.interfaces import Preview, Tokenizer, Tokens, TokenSpec, TrainingPass

pytestmark = pytest.mark.filterwarnings("ignore")


class FakeTokenizer(Tokenizer):
    """The mean brightness of four quarters; stops like an interrupted run after `stop_after` calls."""

    def __init__(self, vocab_size: int | None = 256, stop_after: int | None = None) -> None:
        super().__init__()
        self.spec = TokenSpec(4, (1,) * 4, vocab_size, None if vocab_size else 1)
        self.gain = nn.Parameter(torch.ones(()))
        self.stop_after, self.calls, self.modes = stop_after, 0, set()

    def encode(self, data: Tensor, labels: Tensor | None = None) -> Tokens:
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        self.modes.add(self.training)
        level = (F.adaptive_avg_pool2d(data.mean(1), 2).flatten(1) + 1) / 2  # (B, 4)
        return Tokens.of(self.spec, (level * self.gain * 255).round().long())

    def token_makers(self) -> dict[str, Any]:
        return {"spec": self.spec, "gain": self.gain}

    def decode(self, tokens: Tokens, seeds: Tensor | None = None) -> Tensor:
        raise AssertionError("caching codes must only encode")

    def open_preview(self, batch_size: int, seeds: Tensor | None = None) -> Preview:
        raise AssertionError("caching codes must only encode")

    def training_pass(self, data: Tensor, generator: torch.Generator | None = None) -> TrainingPass:
        raise AssertionError("caching codes must only encode")

    @classmethod
    def tiny(cls) -> FakeTokenizer:
        return cls()


def digits(**options: object) -> Digits:
    return Digits(image_size=8, batch_size=500, **options)


def cached(folder: Path, variants: int = 2, tokenizer: FakeTokenizer | None = None) -> CodesRecord:
    return cache_codes(tokenizer or FakeTokenizer(), digits(), folder, variants=variants, batch_size=500)


@pytest.fixture(scope="module")
def written_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes")
    cached(folder)
    return folder


@pytest.fixture
def written(written_once: Path, tmp_path: Path) -> Path:
    """A complete folder with two views of the training images, to be read or damaged."""
    return shutil.copytree(written_once, tmp_path / "written")


def test_cached_codes_equal_codes_made_on_the_fly(tmp_path: Path) -> None:
    record = cached(tmp_path)
    assert record.count == {"train": 1500, "val": 297} and record.variants == {"train": 2, "val": 1} and record.complete
    data = digits()
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    codes = CachedCodes(tmp_path, "val")
    indices = torch.arange(297)
    assert torch.equal(codes.ids(indices, torch.zeros(297).long()), FakeTokenizer().encode(batch["images"]).ids)
    assert torch.equal(torch.tensor(np.array(codes.labels)), batch["labels"])
    train = CachedCodes(tmp_path)
    plain, mirrored = (train.ids(torch.arange(1500), torch.full((1500,), view)) for view in (0, 1))
    assert torch.equal(plain[:, [1, 0, 3, 2]], mirrored)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, np.uint16), (65536, np.uint16), (65537, np.int32)])
def test_codes_take_as_few_bytes_as_the_vocabulary_allows(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    cache_codes(FakeTokenizer(vocab_size), digits(), tmp_path, ["val"], batch_size=500)
    assert CachedCodes(tmp_path, "val").codes.dtype == dtype


def test_ten_crops_are_centre_and_corners_and_their_mirror_images(tmp_path: Path) -> None:
    pixels = torch.arange(36, dtype=torch.uint8).view(1, 1, 6, 6)
    views = image_views(pixels, 4, 10)
    assert len(views) == 10 and {view.shape for view in views} == {(1, 1, 4, 4)}
    assert [int(view[0, 0, 0, 0]) for view in views[:5]] == [7, 0, 2, 12, 14]
    assert all(torch.equal(view.flip(-1), mirror) for view, mirror in zip(views[:5], views[5:], strict=True))
    cached(tmp_path, variants=10)
    assert CachedCodes(tmp_path).codes.shape == (1500, 10, 4)


def test_tokenizer_encodes_in_evaluation_mode_and_gets_its_mode_back(tmp_path: Path) -> None:
    tokenizer = FakeTokenizer().train()
    cached(tmp_path, tokenizer=tokenizer)
    assert tokenizer.modes == {False} and tokenizer.training


@pytest.mark.parametrize("calls", [0, 1, 3, 6])
def test_interrupted_caching_goes_on_where_it_stopped(tmp_path: Path, calls: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "a", tokenizer=FakeTokenizer(stop_after=calls))
    if calls > 1:  # two views of a batch make it whole
        with pytest.raises(ValueError, match="must hold complete codes, got .* images; run the same .* again"):
            CachedCodes(tmp_path / "a")
    rest = FakeTokenizer()
    cached(tmp_path / "a", tokenizer=rest)
    cached(tmp_path / "b")
    assert rest.calls == 7 - 2 * (calls // 2)
    for name in ("train/codes.npy", "train/labels.npy", "val/codes.npy", "val/labels.npy", "codes.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_complete_folder_is_left_as_it_is(written: Path) -> None:
    again = FakeTokenizer()
    assert cached(written, tokenizer=again).complete and again.calls == 0


def test_codes_of_another_tokenizer_are_not_mixed_in(written: Path) -> None:
    other = FakeTokenizer()
    nn.init.constant_(other.gain, 0.5)
    assert tokenizer_hash(other) != tokenizer_hash(FakeTokenizer())
    with pytest.raises(ValueError, match="tokenizer of the codes in .* must be .*, got .*; choose another folder"):
        cached(written, tokenizer=other)


def test_another_number_of_views_is_refused(written: Path) -> None:
    with pytest.raises(ValueError, match="train variants of the codes in .* must be 1, got 2"):
        cached(written, variants=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variants": 3}, r"variants must be one of \(1, 2, 10\), got 3"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"splits": ["test"]}, "splits must be train, val or both, got test"),
        ({"splits": []}, "splits must be train, val or both, got none"),
        ({"tokenizer": FakeTokenizer(None)}, "must make discrete tokens to be cached, got FakeTokenizer"),
        ({"tokenizer": FakeTokenizer(8)}, "tokenizer must give ids from 0 to 8 - 1, got [0-9]+ to"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cache_codes(**{"tokenizer": FakeTokenizer(), "datamodule": digits(), "out": tmp_path, **arguments})


def test_batches_of_cached_codes_hold_ids_and_labels(written: Path) -> None:
    data = digits(codes=str(written))
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert set(batch) == {"ids", "labels"}
        assert batch["ids"].dtype == torch.int64 and batch["ids"].shape == (len(batch["labels"]), 4)
    assert data.class_names == [str(digit) for digit in range(10)]
    assert data.cached_codes("train").record.tokenizer == tokenizer_hash(FakeTokenizer())


def test_every_sample_gets_one_random_view_per_epoch(written: Path) -> None:
    data = digits(codes=str(written))
    data.setup("fit")
    loader, codes = data.train_dataloader(), CachedCodes(written)
    keys = list(range(1500))
    epochs = [loader.dataset.__getitems__([epoch * 1500 + key for key in keys])[0]["ids"] for epoch in (0, 0, 1)]
    assert torch.equal(epochs[0], epochs[1])
    views = torch.from_numpy(codes.codes.astype(np.int64))  # (N, 2, T)
    from_first = (epochs[0] == views[:, 0]).all(1)
    assert ((epochs[0] == views[:, 1]).all(1) | from_first).all()
    assert 600 < from_first.sum() < 900 and not torch.equal(epochs[0], epochs[2])


def test_codes_can_be_read_in_worker_processes_without_copies(written: Path) -> None:
    stored = pickle.dumps(CachedCodes(written))
    assert len(stored) < 1000 and len(pickle.loads(stored)) == 1500


def test_missing_folder_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="codes.json is missing; make the codes with: python -m"):
        CachedCodes(tmp_path / "nowhere")


def test_unknown_split_is_refused(tmp_path: Path) -> None:
    cache_codes(FakeTokenizer(), digits(), tmp_path, ["val"], batch_size=500)
    with pytest.raises(ValueError, match="split of .* must be one of val, got 'train'"):
        CachedCodes(tmp_path)


def test_record_that_does_not_fit_the_arrays_is_refused(written: Path) -> None:
    path = written / "codes.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "seq_len": 5}))
    with pytest.raises(
        ValueError, match=r"must hold uint16 \(1500, 2, 5\) as codes.json says, got uint16 \(1500, 2, 4\)"
    ):
        CachedCodes(written)
    path.write_text(json.dumps({**content, "vocab_size": 1 << 17}))
    with pytest.raises(ValueError, match="must hold int32"):
        CachedCodes(written)
    path.write_text("{")
    with pytest.raises(ValueError, match="must be a record of cached codes"):
        CachedCodes(written)


def test_damaged_and_missing_arrays_are_refused(written: Path) -> None:
    path = written / "train" / "codes.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="codes.npy must be a whole .npy file"):
        CachedCodes(written)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="codes.npy is missing; delete .* and run"):
        CachedCodes(written)


@pytest.fixture
def stored_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_tokenizer(path: str) -> Tokenizer:
        if path != "good":
            raise FileNotFoundError(f"{path} is missing\nsecond line")
        return FakeTokenizer()

    store = types.SimpleNamespace(load_tokenizer=load_tokenizer)
    monkeypatch.setitem(sys.modules, "vision_ar.checkpoints.store", store)  # type: ignore[arg-type]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: {class_path: somewhere.Else}\n"
        "data: {class_path: vision_ar.data.images.Digits, init_args: {image_size: 8, codes: made/later}}\n"
    )
    return path


@pytest.mark.usefixtures("stored_tokenizer")
def test_command_writes_the_codes_of_a_training_config(tmp_path: Path, config: Path) -> None:
    main(
        [
            "--tokenizer",
            "good",
            "--data",
            str(config),
            "--out",
            str(tmp_path / "out"),
            "--split",
            "val",
            "--device",
            "cpu",
        ]
    )
    assert len(CachedCodes(tmp_path / "out", "val")) == 297


def test_data_section_may_stand_alone(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("class_path: vision_ar.data.images.Digits\ninit_args: {batch_size: 7}\n")
    data = load_data(str(tmp_path / "data.yaml"))
    assert isinstance(data, Digits) and data.batch_size == 7


def test_another_root_replaces_the_one_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("data: {class_path: vision_ar.data.images.Parquet, init_args: {root: here}}\n")
    data = load_data(str(tmp_path / "data.yaml"), root="there")
    assert isinstance(data, Parquet) and data.root == "there"


@pytest.mark.usefixtures("stored_tokenizer")
@pytest.mark.parametrize(
    ("tokenizer", "content", "message"),
    [
        ("bad", None, "error: bad is missing second line"),
        ("good", "data: {class_path: nowhere.Nothing}", "error: .*must be YAML with the class_path"),
        ("good", "[", "error: .*must be YAML with the class_path"),
        (
            "good",
            "data: {class_path: vision_ar.data.images.Digits, init_args: {image_size: 0}}",
            "image_size must be at",
        ),
    ],
)
def test_mistakes_end_the_command_with_one_line_and_code_2(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str], tokenizer: str, content: str | None, message: str
) -> None:
    if content is not None:
        config.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main(["--tokenizer", tokenizer, "--data", str(config), "--out", str(tmp_path / "out"), "--device", "cpu"])
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1
    assert re.search(message, lines[0])
