"""Statistics files: what a reference set leaves behind, so that its images are read once.

Three kinds are read: our own (`make-reference` writes it), the ADM layout (`mu`, `sigma`, `mu_s`, `sigma_s` in an .npz)
and the caches of torch-fidelity (`mu`, `sigma` in a .pt). Ours is the ADM layout too, with a member `about` that says
which extractor saw which images, and with the features in an .npy beside it, for metrics that need more than moments.
"""

from __future__ import annotations

import json
import os
import tokenize
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vision_ar.checkpoints.store import sha_of
from vision_ar.evaluation.frechet import Moments

BROKEN = (
    ValueError,
    OSError,
    EOFError,
    TypeError,
    NotImplementedError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What numpy and zipfile end in on a broken .npz."""
MEMBERS = ("mu", "sigma", "mu_s", "sigma_s")
PICKLED = [np.ndarray, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]
"""Classes that a cache of torch-fidelity holds; nothing else is built from it."""


@dataclass(frozen=True)
class FixedMoments:
    """Moments that were computed before; see `frechet.Moments`."""

    mean: Tensor
    covariance: Tensor


@dataclass
class Statistics:
    """A reference set as metrics see it.

    Args:
        name: for messages and reports.
        digest: first 16 hex digits of the sha256 of the file.
        moments: of the features.
        spatial: of the spatial features, for sFID, or None.
        features: all of them, (N, F), float32, memory-mapped, for KID, precision and recall, or None.
        about: `extractor`, `weights` (its digest), `images` (digest), `count`, `height`, `width`, ...; empty for files
            that other programs wrote.
    """

    name: str
    digest: str
    moments: Moments
    spatial: Moments | None = None
    features: np.ndarray | None = None
    about: dict[str, Any] = field(default_factory=dict)


def save_statistics(
    path: str | Path,
    moments: Moments,
    spatial: Moments | None = None,
    features: np.ndarray | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Write an .npz in the ADM layout, and its features beside it; each file appears whole or not at all."""
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"out must end with .npz, got {path}")
    arrays = {"mu": moments.mean.numpy(), "sigma": moments.covariance.numpy()}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean.numpy(), "sigma_s": spatial.covariance.numpy()}
    path.parent.mkdir(parents=True, exist_ok=True)
    about = dict(about or {})
    features_path(path).unlink(missing_ok=True)  # of an earlier file of this name
    if features is not None:
        with replaced(features_path(path)) as partial:
            np.save(partial, features)
        about["features"] = file_digest(features_path(path))
    with replaced(path) as partial:
        np.savez(partial, **arrays, about=np.array(json.dumps(about)))  # type: ignore[arg-type]


def load_statistics(path: str | Path) -> Statistics:
    """Read a statistics file of any of the three kinds; nothing in it is run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or holds no statistics.
    """
    path = Path(path)
    if not path.is_file():
        command = "python -m vision_ar.evaluation make-reference --protocol P --data DIR --out FILE.npz"
        raise FileNotFoundError(f"reference must be a file that exists, got {path}; make one with: {command}")
    arrays = read_cache(path) if path.suffix in (".pt", ".pth") else read_npz(path)
    found: dict[str, FixedMoments] = {}
    for name, mean, covariance in (("moments", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        if mean in arrays and covariance in arrays:
            found[name] = checked_moments(arrays[mean], arrays[covariance], path)
    if "moments" not in found:
        raise ValueError(f"{path} must hold mu and sigma, got {', '.join(sorted(arrays)) or 'nothing'}")
    try:
        about = json.loads(str(arrays["about"])) if "about" in arrays else {}
    except ValueError as error:
        raise ValueError(f"{path} must say in JSON what it is about, got: {error}") from error
    if not isinstance(about, dict):
        raise ValueError(f"{path} must say in a JSON object what it is about, got a {type(about).__name__}")
    features = None
    if features_path(path).is_file() and "features" in about:
        if file_digest(features_path(path)) != about["features"]:
            raise ValueError(f"{features_path(path)} must be the one written with {path.name}, it was changed since")
        features = np.load(features_path(path), mmap_mode="c", allow_pickle=False)
    return Statistics(path.name, file_digest(path), found["moments"], found.get("spatial"), features, about)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The small members of an .npz; images in it stay unread."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in (*MEMBERS, "about") if name in file}
    except BROKEN as error:
        raise ValueError(f"{path} must be a whole .npz of plain arrays, got: {error}") from error


def read_cache(path: Path) -> dict[str, np.ndarray]:
    """What torch-fidelity cached for FID, opened weights-only."""
    reconstruct: Any = np.zeros(0).__reduce__()[0]
    names = [f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")]  # numpy 2 moved it
    try:
        with torch.serialization.safe_globals([*((reconstruct, name) for name in names), *PICKLED]):
            content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # the unpickler's refusals have no common base, and advise to run the file as code
        kind = type(error).__name__
        raise ValueError(f"{path} must be a cache of torch-fidelity, it was refused ({kind})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a cache of torch-fidelity with mu and sigma, got a {type(content).__name__}")
    return {name: np.asarray(content[name]) for name in ("mu", "sigma") if name in content}


def checked_moments(mean: np.ndarray, covariance: np.ndarray, path: Path) -> FixedMoments:
    """Moments in float64, or a ValueError that names the file."""
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{path} must hold mu (F,) and sigma (F, F), got {mean.shape} and {covariance.shape}")
    if not all(kind.kind == "f" for kind in (mean.dtype, covariance.dtype)):
        raise ValueError(f"{path} must hold real numbers, got {mean.dtype} and {covariance.dtype}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path} must hold finite numbers, got some that are not")
    spread = np.abs(covariance).max(initial=0.0)
    if np.abs(covariance - covariance.T).max(initial=0.0) > 1e-3 * spread or (np.diagonal(covariance) < 0).any():
        raise ValueError(f"{path} must hold a covariance in sigma, got a matrix that is not symmetric or has negatives")
    return FixedMoments(torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64)))


def features_path(path: Path) -> Path:
    """Where the features of a statistics file are."""
    return path.with_suffix(".features.npy")


def file_digest(path: Path) -> str:
    """First 16 hex digits of the sha256 of a file."""
    return sha_of(path).hexdigest()[:16]


class replaced:  # noqa: N801 used like a function
    """Context in which a file is written under another name; it takes its own when the context ends well."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(f".{path.name}.{os.getpid()}.partial{path.suffix}")

    def __enter__(self) -> Path:
        """The name to write."""
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Put it in place, or remove it after an error."""
        try:
            if kind is None:
                os.replace(self.partial, self.path)
        finally:
            self.partial.unlink(missing_ok=True)
