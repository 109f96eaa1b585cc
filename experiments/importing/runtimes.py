"""NeMo's own export of a model beside ours of its import, in runtimes that other people use.

onnxruntime is given the same features; sherpa-onnx and onnx-asr are given the recording and compute
their own. All must read the same tokens from both files.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from asr.importing.nemo import import_nemo
from asr.network.checkpoint import Checkpoint
from asr.network.export import to_onnx
from asr.runtime.decoding import greedy_decode
from asr.runtime.features import log_mel
from experiments.check_sherpa_onnx import Sherpa


def compare_exports(folder: Path, name: str) -> list[dict[str, Any]]:
    """What each runtime reads from FOLDER/audio.npy by FOLDER/NAME.onnx and by our export."""
    checkpoint = import_nemo(folder / f"{name}.nemo").checkpoint
    ours, theirs = folder / "ours", folder / "theirs"
    for place in (ours, theirs):
        place.mkdir(exist_ok=True)
    to_onnx(checkpoint, ours / "model.onnx")
    place_theirs(folder / f"{name}.onnx", theirs, checkpoint)
    for place in (ours, theirs):
        describe(place, checkpoint)
    waveform = np.load(folder / "audio.npy")
    features = log_mel(waveform, checkpoint.features)
    found, expected = log_probs(ours, features), log_probs(theirs, features)
    last = expected.shape[1] - 1
    expected = expected[:, [last, *range(1, last), 0]]
    rows = [
        row("onnxruntime", greedy_decode(found), greedy_decode(expected))
        | {"log_probs": float(abs(found - expected).max())}
    ]
    for runtime, read in (("sherpa-onnx", sherpa_tokens), ("onnx-asr", onnx_asr_tokens)):
        rows.append(row(runtime, read(ours, waveform), read(theirs, waveform)))
    return rows


def row(runtime: str, ours: list[Any], theirs: list[Any]) -> dict[str, Any]:
    """How many tokens a runtime reads from NeMo's export, and whether ours gives the same."""
    name = f"{runtime} {version(runtime.replace('-', '_'))}"
    return {"runtime": name, "tokens": len(theirs), "same_tokens": ours == theirs}


def place_theirs(path: Path, folder: Path, checkpoint: Checkpoint) -> None:
    """NeMo's export with the metadata and the list of tokens that sherpa-onnx wants."""
    model = onnx.load(path)
    about = {
        "model_type": "EncDecCTCModelBPE", "normalize_type": "per_feature",
        "vocab_size": str(len(checkpoint.tokenizer) - 1),
        "subsampling_factor": str(checkpoint.model.config.total_factor),
    }  # fmt: skip
    onnx.helper.set_model_props(model, about)
    onnx.save(model, folder / "model.onnx")
    _, *middle, first = checkpoint.tokenizer.tokens
    lines = [f"{token} {i}\n" for i, token in enumerate([first, *middle, "<blk>"])]
    (folder / "tokens.txt").write_text("".join(lines), encoding="utf-8")


def describe(folder: Path, checkpoint: Checkpoint) -> None:
    """The files that onnx-asr reads beside a model."""
    (folder / "vocab.txt").write_bytes((folder / "tokens.txt").read_bytes())
    about = {
        "model_type": "nemo-conformer-ctc", "features_size": checkpoint.features.n_mels,
        "subsampling_factor": checkpoint.model.config.total_factor,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about))


def log_probs(folder: Path, features: Any) -> Any:
    """What onnxruntime makes of features (T, n_mels): (T', V)."""
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    length = np.array([len(features)], np.int64)
    feed = {"audio_signal": np.ascontiguousarray(features.T[None]), "length": length}
    return session.run(["logprobs"], feed)[0][0]


def sherpa_tokens(folder: Path, waveform: Any) -> list[str]:
    """The text in sherpa-onnx, in characters."""
    return list(Sherpa(folder / "model.onnx").transcribe(waveform))


def onnx_asr_tokens(folder: Path, waveform: Any) -> list[str]:
    """The text in onnx-asr, in characters."""
    import onnx_asr

    return list(onnx_asr.load_model("nemo-conformer-ctc", folder).recognize(waveform))
