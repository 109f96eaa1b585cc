"""A corpus that takes no time: every letter is a tone, and a tiny model learns to read it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile

TEXTS = ("ab", "ba", "abc", "cab", "bca a", "acb", "b ca", "cc a", "a b c", "ca", "bb a", "c")


def tone_waveform(text: str, seed: int = 0) -> np.ndarray:
    """0.2 s a character: letters are tones with a little noise, a space is near silence."""
    rng = np.random.default_rng(seed)
    time = np.arange(3200) / 16000
    pieces = [
        0.3 * np.sin(2 * np.pi * 300 * (ord(c) - 95) * time) if c != " " else 0 * time for c in text
    ]
    return (np.concatenate(pieces) + 0.01 * rng.standard_normal(3200 * len(text))).astype("f4")


def write_corpus(folder: Path, per_text: int = 2) -> Path:
    """Manifests train.json and dev.json with their WAV files; other speakers in each."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, texts in (("train", TEXTS[:9]), ("dev", TEXTS[9:])):
        lines = []
        for number, text in enumerate(texts * per_text):
            path = folder / f"{split}-{number}.wav"
            soundfile.write(path, tone_waveform(text, number), 16000, subtype="PCM_16")
            lines.append({
                "audio_filepath": path.name, "duration": 0.2 * len(text), "text": text,
                "speaker": f"{split}{number % 2}",
            })  # fmt: skip
        (folder / f"{split}.json").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder
