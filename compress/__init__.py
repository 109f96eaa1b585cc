"""Compression of Conformer-CTC checkpoints. A folder with `Config` and `apply` is a method.

What methods share lies beside the folders and knows none of them but through `registry`; methods
know nothing of one another. `compress.core` says what the two must look like.
"""

from compress.registry import method, methods

__all__ = ["method", "methods"]
