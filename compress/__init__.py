"""Compression of Conformer-CTC checkpoints. The folder is the registry of methods.

A module of this package with a `Config` dataclass and an `apply` function is a method; nothing else
has to know of it. `compress.core` says what the two must look like.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType


@cache
def methods() -> dict[str, ModuleType]:
    """All methods by name, sorted: the modules of this folder with `Config` and `apply`."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        if hasattr(module, "Config") and hasattr(module, "apply"):
            found[info.name] = module
    return dict(sorted(found.items()))


def method(name: str) -> ModuleType:
    """The method's module; a ValueError lists the methods there are."""
    if name not in methods():
        raise ValueError(f"unknown method {name!r}; the methods are {', '.join(methods())}")
    return methods()[name]
