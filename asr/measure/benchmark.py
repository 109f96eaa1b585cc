"""Speed of inference, as scripts/benchmark.py reports it, and the noise that it reads; no torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from asr.corpus.manifest import Utterance
from asr.measure.timing import TimedModel
from asr.runtime.audio import audio_duration

RATE = 16000
NOISE_SECONDS = 10.0


@contextmanager
def synthetic_speech(files: int, seed: int = 0) -> Iterator[list[Utterance]]:
    """`files` WAV files of noise of 2 to 16 s, with random texts of 14 letters a second."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlu "))
    with tempfile.TemporaryDirectory() as folder:
        utterances = []
        for number, seconds in enumerate(rng.uniform(2, 16, files).round(2).tolist()):
            path = Path(folder) / f"{number}.wav"
            soundfile.write(path, noise(seconds, rng), RATE, subtype="PCM_16")
            text = " ".join("".join(rng.choice(letters, int(14 * seconds))).split())
            utterances.append(Utterance(str(path), seconds, text))
        yield utterances


def noise(seconds: float, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """White noise (N,) at 16 kHz, swelling four times a second as syllables do."""
    n = int(seconds * RATE)
    swell = 1 + np.sin(np.arange(n, dtype=np.float32) * (2 * np.pi * 4 / RATE))
    waveform: npt.NDArray[np.float32] = 0.05 * swell * rng.standard_normal(n, dtype=np.float32)
    return waveform


def speed_of_noise(model_paths: Sequence[str | Path], rounds: int = 10) -> list[dict[str, Any]]:
    """`infer_speed` on one thread for NOISE_SECONDS of noise: what targets of latency are about."""
    with tempfile.TemporaryDirectory() as folder:
        audio = Path(folder) / "noise.wav"
        soundfile.write(audio, noise(NOISE_SECONDS, np.random.default_rng(0)), RATE)
        return infer_speed(model_paths, audio, [1], rounds)


def infer_speed(
    model_paths: Sequence[str | Path], audio_path: str | Path, threads: Sequence[int],
    rounds: int, warmup: int = 3,
) -> list[dict[str, Any]]:  # fmt: skip
    """Latency in seconds of each model with each number of threads on one recording.

    Every model runs in its own process. Rounds are interleaved, all models in turn, so that a
    disturbance of the machine falls on all of them. `speedup` is the median of the first model with
    the same threads over this one's.
    """
    seconds = audio_duration(audio_path)
    cases = [(path, n) for n in threads for path in model_paths]
    with ExitStack() as stack:
        models = [stack.enter_context(TimedModel(path, n, [audio_path])) for path, n in cases]
        for _ in range(warmup):
            for model in models:
                model.round()
        times = np.array([[model.round()[0] for model in models] for _ in range(rounds)])
        peaks = [model.peak_rss() for model in models]
    medians = np.median(times, axis=0)
    rows: list[dict[str, Any]] = []
    for i, (path, n) in enumerate(cases):
        first = medians[i - i % len(model_paths)]
        rows.append({
            "model": str(path), "threads": n, "bytes": Path(path).stat().st_size,
            "latency": float(medians[i]), "fastest": float(times[:, i].min()),
            "rtf": float(medians[i] / seconds), "speedup": float(first / medians[i]),
            "peak_rss": peaks[i],
        })  # fmt: skip
    return rows
