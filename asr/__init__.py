"""A Conformer-CTC speech recogniser for small computers.

`asr.load().transcribe(waveform or path)` gives the text, with its words' times, by the English
model that ships; `asr.load(path)` runs another `.pt` or `.onnx` model. Importing `asr` imports
neither torch nor onnxruntime.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

__version__ = "0.1.0"

if TYPE_CHECKING:
    from asr.network.export import Exported
    from asr.runtime.beam import BeamConfig
    from asr.runtime.recognizer import Recognizer
    from asr.training.run import Trained


def load(
    path: str | Path | None = None, threads: int = 0,
    beam: BeamConfig | Literal[False] | None = None, min_confidence: float | None = None,
) -> Recognizer:  # fmt: skip
    """Loads a `.pt` checkpoint or an `.onnx` export, else the English model that ships.

    `threads` 0 means all cores. As in the command the English model comes with its language model;
    `beam=False` leaves that out. Other models decode greedily unless `beam` sets up a search, e.g.
    `asr.runtime.beam.BeamConfig(lm="english.lm")`. Segments of which less than a share of
    `min_confidence` of the words is expected to be right are left out; 0 leaves in what is heard
    in noise and music, None is `asr.runtime.recognizer.MIN_CONFIDENCE`.
    """
    from asr.runtime.recognizer import load as load_recognizer

    return load_recognizer(path, threads, beam, min_confidence)


def train(
    data_dir: str | Path | Sequence[str | Path], output_dir: str | Path, *,
    init_from: str | Path | None = None, resume: bool = False, **settings: Any,
) -> Trained:  # fmt: skip
    """Trains a model on manifests or LibriSpeech folders: OUTPUT_DIR/model.pt. Needs torch.

    `settings` are the other flags of train.py, such as `preset="tiny", epochs=20`; `init_from` is
    the checkpoint to fine-tune, `resume` goes on with an interrupted run.
    """
    from asr.training.run import train as train_model

    return train_model(data_dir, output_dir, init_from=init_from, resume=resume, **settings)


def evaluate(
    model_path: str | Path, data: str | Path | Sequence[str | Path], *, batch_size: int = 8,
    threads: int = 0, limit: int = 0, seed: int = 0, speed: bool = True,
    beam: BeamConfig | None = None, other: str | Path | None = None, normalize: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Measures a `.pt` or `.onnx` model on test data: `wer`, `cer` (shares) and much more.

    The keys are those of evaluate.py's result file; without `speed` latency and memory are left
    out. `limit` takes the first so many utterances of each of `data`, `other` is a result file of
    evaluate.py to compare with. With `normalize`, a language such as "en", words are compared as
    they are said, without punctuation and with numbers in words.
    """
    from asr.measure.evaluation import evaluate_data

    return evaluate_data(
        model_path, data, batch_size=batch_size, threads=threads, limit=limit, seed=seed,
        speed=speed, beam=beam, other=other, normalize=normalize,
    )  # fmt: skip


def export_onnx(model_path: str | Path, output_path: str | Path, compute: str = "int8") -> Exported:
    """Exports a checkpoint to an `.onnx` file that runs without torch; compares the two."""
    from asr.network.export import export_onnx as export

    return export(model_path, output_path, compute)
