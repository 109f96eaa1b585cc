"""Measures the speed with a language model: of the search, and of a waveform's way to text.

    taskset -c 0 python experiments/measure_lm_speed.py \
        --test_data ../shared/LibriSpeech/dev-clean --output_path experiments/speed/lm.json

One thread, one utterance at a time. A language model remembers what it was asked, so every round
starts with a new one; of each utterance the median of the rounds counts. Run it on an idle machine:
how busy it was before is written too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from asr.common.provenance import command_line, portable_path
from asr.measure.evaluation import read_test_data, spread
from asr.measure.machine import busy_cores, busy_note, provenance
from asr.measure.timing import summarise
from asr.runtime.audio import read_audio
from asr.runtime.beam import BeamConfig
from asr.runtime.cli import Parser, guarded
from asr.runtime.files import check_writable, write_json
from asr.runtime.language_model import add_beam_flags, beam_from_flags, load_decoder
from asr.runtime.recognizer import load
from asr.runtime.shipped import find_language_model

ROUNDS = 3


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_path", help=".onnx or .pt model (default: the English one that ships)")
    add("--test_data", required=True, help="manifest or LibriSpeech folder")
    add("--limit", type=int, default=40, help="so many utterances of it (default: 40)")
    parser.add_output_path("JSON with the figures")
    add_beam_flags(parser)
    args = parser.parse_args(argv)
    if args.limit < 1:
        parser.error("--limit must be at least 1")
    args.command = command_line("experiments/measure_lm_speed.py", argv)
    return args


def timed(function: Callable[[Any], Any], first: Any, inputs: Sequence[Any]) -> list[float]:
    """Seconds of each call, behind one for the `first` that does not count."""
    function(first)
    seconds = []
    for each in inputs:
        start = time.perf_counter()
        function(each)
        seconds.append(time.perf_counter() - start)
    return seconds


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes."""
    if args.output_path:
        check_writable(args.output_path)
    busy = busy_cores()
    beam = beam_from_flags(args) or BeamConfig(lm=find_language_model() or "")
    if not beam.lm:
        raise ValueError("no language model to measure; name one with --lm")
    recognizer = load(args.model_path, 1, beam)
    rate = recognizer.info.features.sample_rate
    utterances = spread(read_test_data(args.test_data), args.limit + 1)
    first, *waveforms = [read_audio(u.audio_filepath, rate) for u in utterances]
    durations = [len(waveform) / rate for waveform in waveforms]
    first_read, *read = [recognizer.waveform_log_probs(w) for w in (first, *waveforms)]
    rounds: dict[str, list[list[float]]] = {"search": [], "whole": []}
    for _ in range(ROUNDS):
        decoder = load_decoder(recognizer.info.tokens, beam)
        rounds["search"].append(timed(decoder, first_read, read))
        recognizer.decoder = load_decoder(recognizer.info.tokens, beam)
        rounds["whole"].append(timed(recognizer.transcribe, first, waveforms))
    result: dict[str, Any] = {"utterances": len(waveforms), "seconds": sum(durations)}
    for name, seconds in rounds.items():
        summary = summarise(np.median(seconds, axis=0).tolist(), durations)
        result[name] = summary | {"times_real_time": 1 / summary["rtf"]}
        print(f"{name}: {1 / summary['rtf']:.0f} times real time", flush=True)
    if note := busy_note(busy):
        print(note)
    if args.output_path:
        about = {
            "model": portable_path(args.model_path or "the English model that ships"),
            "lm": portable_path(beam.lm),
            "beam_size": beam.beam_size,
            "test_data": portable_path(args.test_data),
            "busy_cores_before": busy,
        }
        write_json(args.output_path, about | provenance(args.command) | result)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
