"""The methods there are: the listing of this folder."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path
from types import ModuleType


@cache
def methods() -> dict[str, ModuleType]:
    """All methods by name, sorted: the modules of this folder with `Config` and `apply`."""
    found = {}
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f"compress.{info.name}")
        if hasattr(module, "Config") and hasattr(module, "apply"):
            found[info.name] = module
    return dict(sorted(found.items()))


def method(name: str) -> ModuleType:
    """The method's module; a ValueError lists the methods there are."""
    if name not in methods():
        raise ValueError(f"unknown method {name!r}; the methods are {', '.join(methods())}")
    return methods()[name]
