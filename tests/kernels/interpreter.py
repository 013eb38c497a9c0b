"""Run checks of Triton kernels without a GPU, in Triton's interpreter; it is chosen when Triton is first imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def interpret(module: str, function: str) -> str:
    """Call function("cpu") of a test module in a process whose kernels are interpreted: "equal", or what it raised."""
    command = f"from {module} import {function}; {function}('cpu'); print('equal')"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, env=environment, timeout=300, cwd=ROOT
    )
    return done.stdout.strip() if done.returncode == 0 else done.stderr[-2000:]
