"""A NeMo archive as a checkpoint of this project, and the check that ends an import."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asr.common.provenance import commit
from asr.importing.archive import ArchiveError, open_archive, read_weights, read_yaml
from asr.importing.settings import read_plan
from asr.importing.vocabulary import read_vocabulary
from asr.importing.weights import build_model
from asr.network.checkpoint import Checkpoint
from asr.runtime.config import FeatureConfig
from asr.runtime.decoding import greedy_decode
from asr.runtime.features import log_mel, mel_filters

LARGEST_FILTER_DIFFERENCE = 1e-6  # of the filter bank; librosa's and ours differ by 4e-9
CLIP_SECONDS = 2.0


@dataclass
class Imported:
    """What an import gives: the checkpoint, and what the user should know."""

    checkpoint: Checkpoint
    notes: list[str] = field(default_factory=list)


def import_nemo(path: str | Path, language: str = "", frontend: str = "") -> Imported:
    """The model of a .nemo file or folder.

    `language` picks one of a multilingual model's; `frontend` is "old" (NeMo up to 2.4) or "new",
    by default what the archive's version says. Raises ArchiveError, in one line, for everything
    that cannot be imported exactly.
    """
    try:
        with open_archive(path) as archive:
            config = read_yaml(archive)
            plan = read_plan(config, frontend)
            vocabulary = read_vocabulary(archive, config, plan.vocabulary, language)
            state = read_weights(archive)
        check_filters(state, plan.features)
        model = build_model(state, plan, vocabulary.rows)
    except ArchiveError as error:
        raise ArchiveError(f"{path}: {error}") from None
    entry = history_entry(path) | {
        key: str(config[key])[:2000] for key in ("target", "nemo_version", "license", "name")
        if config.get(key)
    }  # fmt: skip
    if language:
        entry["config"] = {"language": language}
    checkpoint = Checkpoint(model, vocabulary.tokenizer, plan.features, history=[entry])
    return Imported(checkpoint, [*plan.notes, *vocabulary.notes])


def history_entry(path: str | Path) -> dict[str, Any]:
    """What a checkpoint's history says about the file it came from."""
    return {
        "step": "import", "source": Path(path).name, "sha256": digest(path), "commit": commit()
    }  # fmt: skip


def check_filters(state: dict[str, Tensor], features: FeatureConfig) -> None:
    """ArchiveError unless the filter bank and the window of the archive, if there, are ours."""
    ours = {"fb": mel_filters(features), "window": np.hanning(features.win_length)}
    for name, values in ours.items():
        theirs = state.get(f"preprocessor.featurizer.{name}")
        if theirs is None:
            continue
        theirs = theirs.float().squeeze(0)
        expected = torch.from_numpy(values).float()
        if theirs.shape != expected.shape or not (
            (theirs - expected).abs().max() <= LARGEST_FILTER_DIFFERENCE
        ):
            raise ArchiveError(
                f"preprocessor.featurizer.{name} is not what the yaml's preprocessor settings give"
            )


def check_model(checkpoint: Checkpoint, clip: np.ndarray[Any, Any] | None = None) -> str:
    """The text of `clip`, a waveform (N,), once silence and speech give finite outputs.

    Without a clip a sound like a vowel is read. Raises ArchiveError for NaN or infinite outputs.
    """
    features = checkpoint.features
    n = int(CLIP_SECONDS * features.sample_rate)
    spoken = vowel(n, features.sample_rate) if clip is None else clip
    ids: list[int] = []
    for name, waveform in (("silence", np.zeros(n, np.float32)), ("speech", spoken)):
        with torch.inference_mode():
            x = torch.from_numpy(log_mel(waveform, features))[None]  # (1, T, n_mels)
            log_probs = checkpoint.model(x).log_probs[0]  # (T', V)
        if not torch.isfinite(log_probs).all():
            raise ArchiveError(f"the model gives NaN for {name}: its weights are damaged")
        ids = greedy_decode(log_probs.numpy())
    return checkpoint.tokenizer.decode(ids)


def vowel(n_samples: int, sample_rate: int) -> np.ndarray[Any, Any]:
    """A voice-like sound (N,): harmonics of 120 Hz, loudest near the formants of an a."""
    time = np.arange(n_samples) / sample_rate
    wave = np.zeros(n_samples)
    for hz in range(120, min(4000, sample_rate // 2), 120):
        gain = sum(np.exp(-(((hz - formant) / 200.0) ** 2)) for formant in (700, 1200, 2600))
        wave += (gain + 0.01) * np.sin(2 * np.pi * hz * time)
    wave *= 0.5 + 0.5 * np.sin(2 * np.pi * 3 * time)  # syllables
    return (0.3 * wave / abs(wave).max()).astype(np.float32)


def digest(path: str | Path) -> str:
    """SHA-256 of a file, of a folder that of its weights."""
    path = Path(path)
    with open(path / "model_weights.ckpt" if path.is_dir() else path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
