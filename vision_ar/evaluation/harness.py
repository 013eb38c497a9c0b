"""What all commands share: protocol, extractor, reference, processes and bars."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from vision_ar.command_line import check_writable
from vision_ar.evaluation import protocols
from vision_ar.evaluation.arrays import ArrayFolder
from vision_ar.evaluation.extractors import Extractor, load_extractor
from vision_ar.evaluation.features import FeatureStore
from vision_ar.evaluation.processes import Processes
from vision_ar.evaluation.references import find_reference
from vision_ar.evaluation.scoring import Result
from vision_ar.evaluation.statistics import Statistics
from vision_ar.sampling_options import pick_device

LEAST = {"fid": 2, "sfid": 2, "kid": 2, "precision_recall": 4, "is": 10}
"""Images without which a metric says nothing."""
LOG_EVERY_S = 30
"""Seconds between two lines of progress where nobody watches a terminal."""


class Store(Protocol):
    """What is prepared by one process and filled by all."""

    arrays: ArrayFolder

    def prepare(self) -> None:
        """Make or check the folder."""

    def fill(self, rank: int, world_size: int, advance: Callable[[int], Any]) -> None:
        """Do this process's share."""


class Harness:
    """One run of a command.

    Args:
        given: arguments of the command.
        out: folder of the features.
        kind: of the protocols that the command follows, None for any that reads images.
    """

    def __init__(self, given: argparse.Namespace, out: Path, kind: str | None = None) -> None:
        self.processes = Processes.join()
        self.given, self.out = given, out
        for name in ("out", "images"):
            if getattr(given, name, None) == "":
                raise ValueError(f"{name} must have a name, got an empty one")
        if self.processes.first:
            check_writable(out)
        self.protocol = protocols.find_protocol(given.protocol)
        if kind is not None and self.protocol.kind != kind:
            raise ValueError(f"protocol must be one of {kind}, got {given.protocol}, which is for {self.protocol.kind}")
        if getattr(given, "extractor", None) is not None:
            self.protocol = replace(self.protocol, name=f"{self.protocol.name}+{Path(given.extractor).stem}",
                                    extractor=given.extractor)  # fmt: skip
        if getattr(given, "reference_hash", None) is not None:
            known = ((given.reference_hash, "the one that was asked for"),)
            self.protocol = replace(self.protocol, reference_digests=known, closed=True)
        device = pick_device(given.device)
        if device == "cuda" and self.processes.world_size > 1:
            device = f"cuda:{self.processes.local_rank}"
        self.device = device
        self._extractor: Extractor | None = None
        if self.protocol.extractor != "none":  # before any work, so that missing weights are met at once
            self._extractor = load_extractor(self.protocol.extractor, given.weights).to(device)
        self.made: dict[str, dict[str, float]] = {}

    @property
    def extractor(self) -> Extractor:
        """What reads the images.

        Raises:
            ValueError: if the protocol reads none.
        """
        if self._extractor is None:
            raise ValueError(
                f"protocol must have an extractor, got {self.protocol.name}; {self.protocol.kind} has none"
            )
        return self._extractor

    def fill(self, store: Store, what: str) -> None:
        """Prepare and fill a store in all processes; the first shows a bar with images per second and time left."""
        start, processes = time.perf_counter(), self.processes
        if processes.first:
            store.prepare()
        processes.wait()
        share = list(store.arrays.batches(processes.rank, processes.world_size))
        total = sum(stop - first for first, stop, _ in share)
        done = sum(stop - first for first, stop, ready in share if ready)
        # a log gets a line now and then, a terminal a bar
        wait = {} if sys.stderr.isatty() else {"mininterval": LOG_EVERY_S, "delay": LOG_EVERY_S}
        with tqdm(total=total, initial=done, desc=what, unit="image", disable=not processes.first, **wait) as bar:
            store.fill(processes.rank, processes.world_size, bar.update)
        processes.wait()
        seconds = time.perf_counter() - start
        self.made[what] = {"images": (total - done) * processes.world_size, "seconds": seconds}

    def features(self, folder: str, pixels: Any) -> FeatureStore:
        """Features of images, complete."""
        store = FeatureStore(self.out / folder, pixels, self.extractor)
        self.fill(store, folder)
        return store

    def reference(self) -> Statistics:
        """The reference, checked."""
        given, folder = self.given, Path(getattr(self.given, "reference_folder", self.out / "reference"))
        return find_reference(
            given.reference,
            given.data,
            self.protocol,
            self.extractor,
            folder,
            lambda store: self.fill(store, "reference"),
        )

    def check_count(self, count: int) -> bool:
        """True when the score is not of as many images as the protocol asks, which must be allowed."""
        if count < 1:
            raise ValueError(f"num must be at least 1, got {count}")
        partial = count != self.protocol.num_samples
        if partial and not self.given.allow_partial:
            raise ValueError(
                f"{self.protocol.name} must have {self.protocol.num_samples} images, got {count}; "
                "--allow-partial scores them and marks the result"
            )
        limits = [(LEAST[metric], metric) for metric in self.protocol.metrics if metric in LEAST]
        least, metric = max(limits, default=(1, ""))
        if count < least:
            raise ValueError(f"num must be at least {least} for {metric}, got {count}")
        return partial

    def conclude(self, path: Path, partial: bool, scores: dict[str, float], stamp: dict[str, Any]) -> Result:
        """Save and print a result, in the first process."""
        result = Result(self.protocol, partial, scores, {**stamp, "made": self.made})
        if self.processes.first:
            result.save(path)
            print(f"{result.table()}\nsaved in {path}")
        return result
