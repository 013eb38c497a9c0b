"""Statistics files: what was saved comes back, files of other programs are read, and nothing in a file is run."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vision_ar.evaluation.frechet import RunningMoments, frechet_distance
from vision_ar.evaluation.statistics import file_digest, load_statistics, replaced, save_statistics

torch.set_num_threads(1)

ABOUT = {"extractor": "cifar10", "weights": "0123456789abcdef", "count": 20, "height": 32, "width": 32}


def normal(count: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randn(count, dim).astype(np.float32)


def moments_of(features: np.ndarray) -> RunningMoments:
    moments = RunningMoments(features.shape[1])
    moments.update(torch.from_numpy(features))
    return moments


def save(path: Path, seed: int = 0) -> np.ndarray:
    """Save statistics of 20 random rows with all that may be saved, and return the rows."""
    features = normal(20, 6, seed)
    save_statistics(path, moments_of(features), moments_of(features[:, :2]), features, ABOUT)
    return features


class Evil:
    """A pickle that makes a folder when it is opened carelessly."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "set.v2.npz"
    features = save(path)
    found = load_statistics(path)
    assert found.spatial is not None and found.features is not None
    for loaded, rows in ((found.moments, features), (found.spatial, features[:, :2])):
        assert torch.equal(loaded.mean, moments_of(rows).mean)
        assert torch.equal(loaded.covariance, moments_of(rows).covariance)
    np.testing.assert_array_equal(found.features, features)
    assert isinstance(found.features, np.memmap) and found.features.dtype == np.float32
    assert found.name == "set.v2.npz" and found.about.items() >= ABOUT.items()
    assert found.digest == hashlib.sha256(path.read_bytes()).hexdigest()[:16] == file_digest(path)
    assert sorted(os.listdir(path.parent)) == ["set.v2.features.npy", "set.v2.npz"]


def test_moments_alone_come_back_without_the_rest(tmp_path: Path) -> None:
    moments = moments_of(normal(9, 3))
    save_statistics(tmp_path / "x.npz", moments)
    found = load_statistics(str(tmp_path / "x.npz"))
    assert (found.spatial, found.features, found.about) == (None, None, {})
    assert frechet_distance(found.moments, moments) == pytest.approx(0, abs=1e-12)


def test_statistics_without_features_do_not_inherit_those_of_the_file_they_replace(tmp_path: Path) -> None:
    save(tmp_path / "x.npz")
    save_statistics(tmp_path / "x.npz", moments_of(normal(20, 6, seed=1)), about=ABOUT)
    assert load_statistics(tmp_path / "x.npz").features is None


def test_another_suffix_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out must end with \.npz, got .*x\.npy"):
        save_statistics(tmp_path / "x.npy", moments_of(normal(9, 3)), features=normal(9, 3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["images", "code"])
def test_a_file_in_the_adm_layout_is_read_and_its_images_are_not_opened(tmp_path: Path, content: str) -> None:
    features, proof = normal(30, 5).astype(np.float64), tmp_path / "proof"
    mean, covariance = features.mean(axis=0), np.cov(features, rowvar=False)
    images = np.zeros((4, 8, 8, 3), np.uint8) if content == "images" else np.array([Evil(proof)], dtype=object)
    np.savez(tmp_path / "x.npz", images, mu=mean, sigma=covariance, mu_s=mean[:2], sigma_s=covariance[:2, :2])
    found = load_statistics(tmp_path / "x.npz")
    assert found.spatial is not None and not proof.exists()
    np.testing.assert_array_equal(found.moments.mean, mean)
    np.testing.assert_array_equal(found.moments.covariance, covariance)
    np.testing.assert_array_equal(found.spatial.covariance, covariance[:2, :2])
    assert (found.features, found.about) == (None, {})


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_cache_of_torch_fidelity_is_read_in_float64(tmp_path: Path, new_format: bool, dtype: type) -> None:
    features = normal(30, 5)
    mean, covariance = features.mean(axis=0), np.cov(features, rowvar=False).astype(dtype)
    path = tmp_path / "set-stat-fid-2048.pt"
    torch.save({"mu": mean, "sigma": covariance}, path, _use_new_zipfile_serialization=new_format)
    found = load_statistics(path)
    assert found.moments.mean.dtype == found.moments.covariance.dtype == torch.float64
    np.testing.assert_array_equal(found.moments.mean, mean.astype(np.float64))
    np.testing.assert_array_equal(found.moments.covariance, covariance.astype(np.float64))
    assert (found.spatial, found.features, found.about) == (None, None, {})


def test_a_pt_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save([np.zeros(3), np.eye(3)], tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt must be a cache of torch-fidelity with mu and sigma, got a list"):
        load_statistics(tmp_path / "x.pt")


def test_a_cache_that_was_written_with_numpy_1_is_read(tmp_path: Path) -> None:
    torch.save({"mu": np.arange(3.0), "sigma": np.eye(3)}, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert (tmp_path / "old.pt").read_bytes().count(b"numpy.core.multiarray") > 0
    assert torch.equal(load_statistics(tmp_path / "old.pt").moments.mean, torch.arange(3.0).double())


def test_a_pickle_in_a_pt_file_is_refused_and_not_run(tmp_path: Path) -> None:
    path, proof = tmp_path / "evil.pt", tmp_path / "proof"
    for new_format in (True, False):
        torch.save({"mu": np.zeros(3), "sigma": Evil(proof)}, path, _use_new_zipfile_serialization=new_format)
        with pytest.raises(ValueError, match=r"evil\.pt must be a cache of torch-fidelity, it was refused"):
            load_statistics(path)
        assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists()  # what the refusal prevented


@pytest.mark.parametrize("member", ["mu", "sigma", "mu_s", "about"])
def test_a_pickle_in_an_npz_file_is_refused_and_not_run(tmp_path: Path, member: str) -> None:
    path, proof = tmp_path / "evil.npz", tmp_path / "proof"
    members = {"mu": np.zeros(3), "sigma": np.eye(3), member: np.array(Evil(proof), dtype=object)}
    np.savez(path, **members)
    with pytest.raises(ValueError, match=r"evil\.npz must be a whole \.npz of plain arrays, got: Object arrays"):
        load_statistics(path)
    assert not proof.exists()


def npy_bytes(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


@pytest.mark.parametrize("name", ["x.npz", "x.pt"])
@pytest.mark.parametrize("content", [None, b"", b"x" * 99, b".", b"\x80\x02}q\x00h\x07.", npy_bytes(np.zeros(3))])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    path, members = tmp_path / name, {"mu": np.zeros(3), "sigma": np.eye(3)}
    np.savez(path, **members) if name == "x.npz" else torch.save(members, path)
    path.write_bytes(path.read_bytes()[:-60] if content is None else content)
    with pytest.raises(ValueError, match=r"x\.npz must be a whole \.npz|x\.pt must be a cache of torch-fidelity"):
        load_statistics(path)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_a_changed_byte_of_an_npz_file_changes_no_number_unnoticed(tmp_path: Path, write: Callable[..., None]) -> None:
    path, mean = tmp_path / "x.npz", normal(1, 30)[0].astype(np.float64)
    write(path, mu=mean, sigma=np.eye(30), about=np.array("{}"))
    data, refused = path.read_bytes(), 0
    for place in range(0, len(data), 11):
        path.write_bytes(data[:place] + bytes([data[place] ^ 2]) + data[place + 1 :])
        try:
            found = load_statistics(path).moments
            assert np.array_equal(found.mean, mean) and np.array_equal(found.covariance, np.eye(30))
        except ValueError as error:
            assert "x.npz must" in str(error)
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"mu": np.array([0, np.nan, 0]), "sigma": np.eye(3)}, "finite numbers, got some that are not"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.inf)}, "finite numbers, got some that are not"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu \(F,\) and sigma \(F, F\), got \(3,\) and \(4, 4\)"),
        ({"mu": np.zeros((1, 3)), "sigma": np.eye(3)}, r"mu \(F,\) and sigma \(F, F\), got \(1, 3\) and \(3, 3\)"),
        ({"mu": np.zeros(3), "sigma": np.zeros(3)}, r"mu \(F,\) and sigma \(F, F\), got \(3,\) and \(3,\)"),
        ({"mu": np.zeros(3)}, "mu and sigma, got mu$"),
        ({"sigma": np.eye(3)}, "mu and sigma, got sigma$"),
        ({"other": np.zeros(3)}, "mu and sigma, got nothing$"),
    ],
)
@pytest.mark.parametrize("suffix", ["npz", "pt"])
def test_moments_that_are_none_are_refused(tmp_path: Path, members: dict, message: str, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    np.savez(path, **members) if suffix == "npz" else torch.save(members, path)
    with pytest.raises(ValueError, match=rf"x\.{suffix} must hold {message}"):
        load_statistics(path)


def test_spatial_moments_and_the_record_are_checked_too(tmp_path: Path) -> None:
    path, moments = tmp_path / "x.npz", {"mu": np.zeros(3), "sigma": np.eye(3)}
    np.savez(path, mu_s=np.zeros(2), sigma_s=np.eye(3), **moments)
    with pytest.raises(ValueError, match=r"x\.npz must hold mu .*, got \(2,\) and \(3, 3\)"):
        load_statistics(path)
    for text in ("{", "[]", "3"):
        np.savez(path, about=np.array(text), **moments)
        with pytest.raises(ValueError, match=r"x\.npz"):
            load_statistics(path)


@pytest.mark.parametrize("name", ["no.npz", "no.pt", "."])
def test_a_missing_file_is_answered_with_the_command_that_makes_one(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="must be a file that exists, got .*; make one with: .*make-reference"):
        load_statistics(tmp_path / name)


@pytest.mark.parametrize(
    "rows", [normal(19, 6), normal(20, 5), normal(20, 6)[0], normal(20, 6, seed=1), b"", b"x" * 99]
)
def test_features_of_another_set_and_damaged_ones_are_refused(tmp_path: Path, rows: Any) -> None:
    save(tmp_path / "x.npz")
    (tmp_path / "x.features.npy").write_bytes(rows if isinstance(rows, bytes) else npy_bytes(rows))
    with pytest.raises(ValueError, match=r"x\.features\.npy must be"):
        load_statistics(tmp_path / "x.npz")


def test_a_write_that_fails_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    with replaced(path) as partial:
        partial.write_text("old")
        assert not path.exists()
    for error, text in ((ValueError, "half"), (KeyboardInterrupt, "half"), (KeyError, None)):
        with pytest.raises(error), replaced(path) as partial:
            if text is not None:
                partial.write_text(text)
            raise error
    assert (os.listdir(tmp_path), path.read_text()) == (["x.txt"], "old")


def test_a_file_that_cannot_take_its_name_is_removed(tmp_path: Path) -> None:
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(OSError, match="directory"), replaced(tmp_path / "x.npz") as partial:
        partial.write_bytes(b"whole")
    assert os.listdir(tmp_path) == ["x.npz"]
