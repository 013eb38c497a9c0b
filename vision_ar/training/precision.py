"""Which precision a run gets: bfloat16 only where the hardware has it."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)


def cpu_has_bfloat16() -> bool:
    """True where matrix products in bfloat16 run on the CPU's own instructions (or at least on 512-bit vectors).

    Elsewhere they are emulated: 0.9 against 80 GFLOP/s for float32 on one core of an AMD EPYC with AVX2.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fitting_precision(precision: str | int | None, accelerator: object) -> str | int | None:
    """The precision asked for, or "32-true" with a warning for bfloat16 on a CPU without it.

    Args:
        precision: as Lightning's Trainer takes it.
        accelerator: likewise, "auto" or "cpu" for instance.
    """
    on_cpu = accelerator == "cpu" or (
        accelerator in ("auto", None) and torch.accelerator.current_accelerator(check_available=True) is None
    )
    if not on_cpu or "bf16" not in str(precision) or cpu_has_bfloat16():
        return precision
    logger.warning("this CPU has no bfloat16: precision %s would be many times slower, 32-true is used", precision)
    return "32-true"
