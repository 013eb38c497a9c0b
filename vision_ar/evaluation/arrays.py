"""Arrays on disk that are filled batch by batch, by any number of processes, and never twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from vision_ar.evaluation.statistics import replaced

ABOUT = "about.json"


class ArrayFolder:
    """Arrays of one row per image in a folder, with a record of what they are of and of the batches that are done.

    Args:
        folder: made by `prepare` when it is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def prepare(self, about: dict[str, Any], count: int, batch_size: int, layout: dict[str, tuple[tuple, Any]]) -> None:
        """Make the arrays, or check that those found are of the same thing; to be called by one process only.

        Args:
            about: what the rows are of; a folder with another record is refused.
            count: number of rows N.
            batch_size: rows that are done together; a folder keeps the one it was begun with.
            layout: shape of a row and kind of number of each array.

        Raises:
            ValueError: if the folder was begun for something else.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        wanted = json.loads(json.dumps({**about, "count": count}))
        path = self.folder / ABOUT
        if path.is_file():
            found = self.about()
            for name, value in wanted.items():
                if found.get(name) != value:
                    raise ValueError(
                        f"{self.folder} was begun with {name} {found.get(name)}, got {value}; "
                        "choose another folder, or delete this one"
                    )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, (shape, dtype) in layout.items():
            open_memmap(self.folder / f"{name}.npy", "w+", dtype, (count, *shape)).flush()
        open_memmap(self.folder / "done.npy", "w+", np.uint8, (-(-count // batch_size),)).flush()
        with replaced(path) as partial:  # last: a folder with this file has all others
            partial.write_text(json.dumps({**wanted, "batch_size": batch_size}, indent=1))

    def about(self) -> dict[str, Any]:
        """The record."""
        path = self.folder / ABOUT
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} must be JSON, got: {error}; delete {self.folder}") from error

    def batches(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, int, bool]]:
        """First row, row after the last one, and whether it is done, of every batch of this process's share."""
        record, done = self.about(), self.open("done")
        first, last = (len(done) * part // world_size for part in (rank, rank + 1))
        for batch in range(first, last):
            start = batch * record["batch_size"]
            yield start, min(start + record["batch_size"], record["count"]), bool(done[batch])

    def write(self, start: int, rows: dict[str, np.ndarray]) -> None:
        """Write a batch, all arrays of it, and then mark it as done."""
        for name, values in rows.items():
            self._put(name, start, values)
        self._put("done", start // self.about()["batch_size"], np.ones(1, np.uint8))

    @property
    def complete(self) -> bool:
        """True when every batch is done."""
        return (self.folder / ABOUT).is_file() and bool(self.open("done").all())

    def open(self, name: str, mode: Any = "c") -> np.memmap:
        """An array, memory-mapped; "c" is for reading (PyTorch wants an array that could be written to)."""
        return open_memmap(self.folder / f"{name}.npy", mode)

    def _put(self, name: str, start: int, values: np.ndarray) -> None:
        array = self.open(name, "r+")
        array[start : start + len(values)] = values
        array.flush()
