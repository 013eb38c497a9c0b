"""bfloat16 is only for hardware that has it."""

from __future__ import annotations

import logging

import pytest
import torch

from vision_ar.training import precision


@pytest.mark.parametrize("accelerator", ["cpu", "auto", None])
@pytest.mark.parametrize("asked", ["bf16-mixed", "bf16-true"])
def test_a_cpu_without_bfloat16_trains_in_float32_and_says_so(monkeypatch, caplog, accelerator, asked) -> None:
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with caplog.at_level(logging.WARNING):
        assert precision.fitting_precision(asked, accelerator) == "32-true"
    assert f"this CPU has no bfloat16: precision {asked} would be many times slower, 32-true is used" in caplog.text


@pytest.mark.parametrize(
    ("asked", "accelerator", "has"),
    [("bf16-mixed", "cpu", True), ("32-true", "cpu", False), (None, "auto", False), ("bf16-mixed", "gpu", False)],
)
def test_all_else_stays_as_it_was_asked_for(monkeypatch, caplog, asked, accelerator, has) -> None:
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: has)
    with caplog.at_level(logging.WARNING):
        assert precision.fitting_precision(asked, accelerator) == asked
    assert not caplog.text
