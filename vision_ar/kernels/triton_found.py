"""Whether Triton is there; looked up once, because a captured or compiled step may not look."""

from __future__ import annotations

import importlib.util

HAS_TRITON = importlib.util.find_spec("triton") is not None
