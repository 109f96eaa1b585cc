"""Compression of Conformer-CTC checkpoints. The folder is the registry of methods.

A module of this package with a `Config` dataclass and an `apply` function is a method; nothing else
has to know of it. `compress.core` says what the two must look like.
"""

from compress.registry import method, methods

__all__ = ["method", "methods"]
