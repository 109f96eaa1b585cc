"""The methods there are: the folders here that have a `Config` and an `apply`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

import compress


@cache
def methods() -> dict[str, ModuleType]:
    """All methods by name, sorted."""
    found = {}
    for info in pkgutil.iter_modules(compress.__path__):
        if info.ispkg:
            package = importlib.import_module(f"compress.{info.name}")
            if hasattr(package, "Config") and hasattr(package, "apply"):
                found[info.name] = package
    return dict(sorted(found.items()))


def method(name: str) -> ModuleType:
    """The method's package; a ValueError lists the methods there are."""
    if name not in methods():
        raise ValueError(f"unknown method {name!r}; the methods are {', '.join(methods())}")
    return methods()[name]
