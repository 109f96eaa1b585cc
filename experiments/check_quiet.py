"""Counts word errors of recordings as they are and at low levels, in 16 bits and in floats.

    python experiments/check_quiet.py --test_data ../shared/LibriSpeech/dev-clean \
        --lm asr/shipped/english.lm --output_path experiments/quiet.json

What the floats lose is due to the level, what the 16 bits lose beyond it to their rounding.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jiwer
import numpy as np

from asr.common.provenance import command_line, portable_path
from asr.measure.evaluation import read_test_data, spread
from asr.measure.machine import provenance
from asr.runtime.audio import Waveform, read_audio
from asr.runtime.cli import Parser, guarded
from asr.runtime.files import check_writable, write_json
from asr.runtime.language_model import add_beam_flags, beam_from_flags
from asr.runtime.recognizer import load

STEPS = 2**15  # of 16 bits, to a full scale of 1


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_path", help=".onnx or .pt model (default: the English one that ships)")
    add("--test_data", required=True, help="manifest or LibriSpeech folder")
    add("--limit", type=int, default=40, help="so many utterances of it (default: 40)")
    add("--peaks", type=float, nargs="+", default=[-40.0, -50.0, -60.0], help="in dBFS")
    parser.add_output_path("JSON with the figures")
    add_beam_flags(parser)
    args = parser.parse_args(argv)
    args.command = command_line("experiments/check_quiet.py", argv)
    return args


def at_level(waveform: Waveform, peak: float, rounded: bool) -> Waveform:
    """The waveform (N,) with its peak at so many dBFS, `rounded` to 16 bits."""
    quiet = waveform * (10 ** (peak / 20) / np.abs(waveform).max())
    return (np.round(quiet * STEPS) / STEPS if rounded else quiet).astype(np.float32)


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes."""
    if args.output_path:
        check_writable(args.output_path)
    recognizer = load(args.model_path, 1, beam_from_flags(args) or False)
    rate = recognizer.info.features.sample_rate
    utterances = spread(read_test_data(args.test_data), args.limit)
    waveforms = [read_audio(u.audio_filepath, rate) for u in utterances]
    texts = [u.text for u in utterances]

    def errors(recordings: Sequence[Waveform]) -> float:
        return float(jiwer.wer(texts, [recognizer.transcribe(w).text for w in recordings]))

    as_it_is = errors(waveforms)
    print(f"as they are: {as_it_is:.1%} of the words wrong", flush=True)
    levels = []
    for peak in args.peaks:
        rounded, floats = (errors([at_level(w, peak, r) for w in waveforms]) for r in (True, False))
        levels.append({"peak": peak, "wer_16_bit": rounded, "wer_float": floats})
        print(f"{peak:.0f} dBFS: {rounded:.1%} in 16 bits, {floats:.1%} in floats", flush=True)
    if args.output_path:
        about = {
            "model": portable_path(args.model_path or "the English model that ships"),
            "test_data": portable_path(args.test_data),
        }
        result = {"utterances": len(utterances), "wer": as_it_is, "levels": levels}
        write_json(args.output_path, about | provenance(args.command) | result)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
