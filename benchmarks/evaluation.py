"""What scoring costs: python -m benchmarks.evaluation [--sizes 10000 40000] [--side 32]

Every size is a process of its own: noise images in an .npy file are scored against 10,000 others with the in-domain
extractor (Fréchet and kernel distance, precision and recall); seconds from opening the file to the scores, and the peak
of the memory. Mapped file pages count as memory while they are used, although the system may drop them at any time;
`anonymous` leaves them out.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

REFERENCE = 10000


def write_noise(path: Path, count: int, side: int, seed: int) -> None:
    """Uniform noise images, (N, side, side, 3), uint8, in blocks."""
    array, draws = open_memmap(path, "w+", np.uint8, (count, side, side, 3)), np.random.default_rng(seed)
    for start in range(0, count, 1000):
        part = array[start : start + 1000]
        part[:] = draws.integers(0, 256, part.shape, np.uint8)
    array.flush()


def measure(folder: Path, extractor: str) -> None:
    """Score `samples.npy` against `reference.npy` and print the row."""
    from vision_ar.evaluation.extractors import load_extractor
    from vision_ar.evaluation.features import FeatureStore
    from vision_ar.evaluation.image_files import open_images
    from vision_ar.evaluation.scoring import score

    stores, judge = [], load_extractor(extractor)
    for name in ("reference", "samples"):
        start = time.perf_counter()
        store = FeatureStore(folder / name, open_images(folder / f"{name}.npy"), judge)
        store.prepare()
        store.fill()
        stores.append(store)
    extracted = time.perf_counter() - start
    score(stores[1], stores[0].statistics(), ("fid", "kid", "precision_recall"))
    total = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()  # Linux only, as the column says
    memory = {name: int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024 for name in ("VmHWM", "RssAnon")}  # type: ignore[index]
    count = stores[1].pixels.count
    row = f"{count:8d}   {extracted:11.1f}   {total:9.1f}   {memory['VmHWM']:8.0f}   {memory['RssAnon']:13.0f}"
    print(row, flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10000, 40000], help="images")
    parser.add_argument("--side", type=int, default=32, help="height and width of the images")
    parser.add_argument("--extractor", default="cifar10")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder is not None:
        measure(given.folder, given.extractor)
        return
    print("  images   features (s)   all (s)   peak MiB   anonymous MiB")
    for count in given.sizes:
        with tempfile.TemporaryDirectory() as scratch:
            write_noise(Path(scratch) / "samples.npy", count, given.side, 0)
            write_noise(Path(scratch) / "reference.npy", REFERENCE, given.side, 1)
            command = [
                sys.executable,
                "-m",
                "benchmarks.evaluation",
                "--folder",
                scratch,
                "--extractor",
                given.extractor,
            ]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
