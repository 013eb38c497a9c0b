"""Finds every concrete class of a contract by walking the package, so that a new file is tested without a list."""

import importlib
import inspect
import pkgutil

import vision_ar


def concrete(base: type) -> list[type]:
    """All non-abstract subclasses of `base` that the package defines."""
    found = set()
    for info in pkgutil.walk_packages(vision_ar.__path__, "vision_ar."):
        for _, cls in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
            if issubclass(cls, base) and not inspect.isabstract(cls) and cls.__module__.startswith("vision_ar."):
                found.add(cls)
    return sorted(found, key=lambda cls: cls.__qualname__)
