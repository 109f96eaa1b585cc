"""Compression of Conformer-CTC checkpoints. A folder with `Config` and `apply` is a method.

What methods share lies beside the folders and knows none of them but through `registry`; methods
know nothing of one another. `compress.core` says what the two must look like. Importing `compress`
imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.registry import method, methods

if TYPE_CHECKING:
    from compress.run import Compressed

__all__ = ["compress", "method", "methods"]


def compress(
    model_path: str | Path, output_dir: str | Path | None = None, **settings: Any
) -> Compressed:
    """Makes a checkpoint smaller, OUTPUT_DIR/model.pt, and measures it where test data is given.

    `settings` are the flags of compress.py, such as `method="quantization", precision="int8"` or
    `recipe="recipe.json"`; `dry_run=True` writes nothing. See `compress.run`.
    """
    from compress.run import compress as compress_file

    return compress_file(model_path, output_dir, **settings)
