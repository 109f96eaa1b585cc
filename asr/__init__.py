"""A Conformer-CTC speech recogniser for small computers.

`asr.load(path).transcribe(waveform or path)` runs a `.pt` or an `.onnx` model and gives the
text, with its words' times; importing `asr` imports neither torch nor onnxruntime.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from asr.runtime.beam import BeamConfig
    from asr.runtime.recognizer import Recognizer


def load(path: str | Path, threads: int = 0, beam: BeamConfig | None = None) -> Recognizer:
    """Loads a `.pt` checkpoint or an `.onnx` export; `threads` 0 means all cores.

    Greedy decoding unless `beam` sets up a search, e.g.
    `asr.runtime.beam.BeamConfig(lm="english.lm")`.
    """
    from asr.runtime.recognizer import load as load_recognizer

    return load_recognizer(path, threads=threads, beam=beam)
