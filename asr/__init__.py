"""A Conformer-CTC speech recogniser for small computers.

`asr.load(path).transcribe(waveform or path)` runs a `.pt` or an `.onnx` model; importing `asr`
imports neither torch nor onnxruntime.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from asr.recognizer import Recognizer


def load(path: str | Path, threads: int = 0) -> Recognizer:
    """Loads a `.pt` checkpoint or an `.onnx` export; `threads` 0 means all cores."""
    from asr.recognizer import load as load_recognizer

    return load_recognizer(path, threads=threads)
