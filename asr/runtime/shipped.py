"""The files that come with the program: the English model and its language model.

They lie in a folder of the package, in a checkout as links to where experiments/ makes them; the
wheel holds what stands in that folder.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "shipped"
MODEL = FOLDER / "english.onnx"


def find_model(path: str | Path | None = None) -> Path:
    """The model named, or the English one that ships."""
    if path is not None:
        return Path(path)
    if not MODEL.exists():
        raise ValueError(f"the English model is missing here ({MODEL}); name a model of yours")
    return MODEL


def find_language_model() -> str | None:
    """The language model that goes with the English model that ships, where it is there."""
    beside = MODEL.with_suffix(".lm")
    return str(beside) if beside.exists() else None
