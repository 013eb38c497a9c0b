"""A batch that will not fit is refused before it is begun, with the batch size that would."""

from __future__ import annotations

import pytest
import torch

from tests.sampler.test_engine import LAWS, make_generator
from vision_ar import sampling_options
from vision_ar.objectives.block import Block
from vision_ar.sampler import memory
from vision_ar.sampler.engine import Condition, Session
from vision_ar.sampler.guidance import constant


@pytest.mark.parametrize("objective", [None, Block(2)])
@pytest.mark.parametrize("guided", [False, True])
def test_the_estimate_counts_the_cache_that_a_session_fills(objective, guided: bool) -> None:
    generator, batch = make_generator(objective), 3
    schedule = constant(2.0) if guided else None
    session = Session(generator, Condition(labels=torch.arange(batch)), torch.arange(batch), LAWS[1], schedule)
    while not session.done:
        session.step()
    cache = session.cache
    cache.set_lengths(cache.lengths)  # all slots are there now
    held = cache.keys.nbytes + cache.values.nbytes
    reads = 1 if objective is None else 2
    logits = batch * (1 + guided) * reads * 16 * 4 * memory.LOGIT_COPIES
    assert memory.batch_bytes(generator, batch, guided) == held + logits
    assert cache.full_bytes == held


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch) -> None:
    generator = make_generator()
    one = memory.batch_bytes(generator, 1, True)
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(10.5 * one / memory.SHARE))
    assert "10 images at a time need" in memory.check_batch(generator, 10, True)
    with pytest.raises(ValueError, match="batch_size must be at most 10 here, got 11: it needs .* cpu has"):
        memory.check_batch(generator, 11, True)
    assert "20 images" in memory.check_batch(generator, 20, False)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert "free" not in memory.check_batch(generator, 10**9, True)


def test_free_memory_is_what_the_system_says(monkeypatch, tmp_path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:   70 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    assert memory.free_bytes(torch.device("cpu")) == 70 * 1024
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    assert memory.free_bytes(torch.device("cpu")) is None


@pytest.mark.parametrize(("grant", "cores"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("", 8)])
def test_a_container_is_not_given_more_threads_than_it_is_granted(grant, cores, monkeypatch, tmp_path) -> None:
    (tmp_path / "cpu.max").write_text(grant)
    monkeypatch.setattr(sampling_options, "CPU_GRANT", tmp_path / "cpu.max")
    monkeypatch.setattr(sampling_options.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert sampling_options.usable_cores() == cores
