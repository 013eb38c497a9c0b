"""Visual autoregressive generation: tokenizers, generators, one exact sampler.

The only `__init__.py` with content: `vision_ar.load` is what users type. It is looked up on first use, because
importing a contract should not import everything.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from vision_ar.pipeline import load

        return load
    raise AttributeError(f"module 'vision_ar' has no attribute {name!r}")
