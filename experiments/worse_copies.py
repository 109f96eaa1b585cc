"""Writes worse copies of a data set, to measure what a model stands.

    python experiments/worse_copies.py --data dev-clean.json --output_dir runs/worse

`noisy` has coloured noise 10 dB below the speech, `telephone` went through a telephone, `quiet` is
at -50 dBFS in 16 bits, `silent` has 3 s before and 5 s after it at a noise 60 dB below the speech.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import soundfile

from asr.corpus.manifest import write_manifest
from asr.corpus.splits import load_dataset
from asr.runtime.audio import SAMPLE_RATE, read_audio
from asr.runtime.cli import Parser, guarded
from asr.training import rooms

Array = rooms.Array


def noisy(waveform: Array, rng: np.random.Generator) -> Array:
    return rooms.add_noise(waveform, rooms.coloured_noise(len(waveform), rng), 10.0)


def quiet(waveform: Array, rng: np.random.Generator) -> Array:
    return rooms.to_level(waveform, -50.0)


def silent(waveform: Array, rng: np.random.Generator) -> Array:
    longer = np.pad(waveform, (3 * SAMPLE_RATE, 5 * SAMPLE_RATE))
    return rooms.add_noise(longer, rng.standard_normal(len(longer), dtype=np.float32), 60.0)


COPIES: dict[str, Callable[[Array, np.random.Generator], Array]] = {
    "noisy": noisy, "telephone": rooms.telephone, "quiet": quiet, "silent": silent,
}  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="manifest or LibriSpeech folder")
    parser.add_argument("--output_dir", required=True, help="folder for the copies' manifests")
    parser.add_argument("--limit", type=int, default=0, help="only the first ones (default: all)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Writes a manifest and its WAV files for each kind of copy."""
    output_dir = Path(args.output_dir)
    utterances = load_dataset(args.data)[: args.limit or None]
    for name, change in COPIES.items():
        copies = []
        for number, u in enumerate(utterances):
            rng = np.random.default_rng((0, number))
            waveform = np.clip(change(read_audio(u.audio_filepath), rng), -1, 1)
            path = output_dir.absolute() / name / f"{u.id}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, waveform, SAMPLE_RATE, subtype="PCM_16")
            copies.append(
                replace(u, audio_filepath=str(path), duration=len(waveform) / SAMPLE_RATE)
            )
        write_manifest(output_dir / f"{name}.json", copies, relative_to=output_dir)
        print(f"{output_dir / name}.json: {len(copies)} recordings", flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
