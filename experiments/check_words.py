"""Checks the times and the confidence of words on real speech.

    python experiments/check_words.py --test_data ../shared/LibriSpeech/dev-clean --limit 90 \
        --output_path experiments/words/words.json

Times: utterances without the silence around them are joined with pauses of known length, in the
noise of a quiet room; compared are the words beside these pauses. Confidence: the share of wrong
words among those of each tenth of confidence, and among the sure ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jiwer
import numpy as np

from asr.common.provenance import command_line, portable_path
from asr.corpus.manifest import Utterance
from asr.measure.evaluation import read_test_data, spread
from asr.measure.machine import provenance
from asr.runtime.audio import Waveform, read_audio
from asr.runtime.cli import Parser, guarded
from asr.runtime.files import check_writable, write_json
from asr.runtime.language_model import add_beam_flags, beam_from_flags
from asr.runtime.pauses import HOP, levels
from asr.runtime.recognizer import Recognizer, load

TOGETHER = 3  # utterances of a recording
PAUSES = (0.3, 2.0)  # seconds, the shortest and the longest pause
ROOM = 1e-3  # noise between utterances, -60 dBFS
HEARD = 30.0  # dB below the loud twentieth of an utterance: its speech begins and ends there
SURE = 0.9


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_path", help=".onnx or .pt model (default: the English one that ships)")
    add("--test_data", required=True, help="manifest or LibriSpeech folder")
    add("--limit", type=int, default=90, help="so many utterances of it (default: 90)")
    add("--seed", type=int, default=0, help="seed of the pauses (default: 0)")
    parser.add_output_path("JSON with the figures")
    add_beam_flags(parser)
    args = parser.parse_args(argv)
    args.command = command_line("experiments/check_words.py", argv)
    return args


def trimmed(waveform: Waveform, rate: int) -> Waveform:
    """An utterance (N,) from its first to its last 50 ms of speech."""
    level = levels(waveform, rate)
    loud = level > np.percentile(level, 95) - HEARD
    speech = np.flatnonzero(np.convolve(loud, np.ones(5), "valid") >= 4)
    hop = int(HOP * rate)
    return waveform[speech[0] * hop : (speech[-1] + 5) * hop]


def time_errors(
    recognizer: Recognizer, utterances: Sequence[Utterance], random: np.random.Generator
) -> list[float]:
    """Seconds by which the words beside known pauses start or end too late."""
    rate = recognizer.info.features.sample_rate
    errors: list[float] = []
    for at in range(0, len(utterances), TOGETHER):
        parts, spans, now = [], [], 0
        for utterance in utterances[at : at + TOGETHER]:
            said = trimmed(read_audio(utterance.audio_filepath, rate), rate)
            pause = int(random.uniform(*PAUSES) * rate)
            parts += [ROOM * random.standard_normal(pause, np.float32), said]
            spans.append(((now + pause) / rate, (now + pause + len(said)) / rate))
            now += pause + len(said)
        parts.append(ROOM * random.standard_normal(rate, np.float32))
        words = recognizer.transcribe(np.concatenate(parts)).words
        for start, end in spans:
            inside = [w for w in words if start - 0.1 < (w.start + w.end) / 2 < end + 0.1]
            if inside:
                errors += [inside[0].start - start, inside[-1].end - end]
    return errors


def confidences(
    recognizer: Recognizer, utterances: Sequence[Utterance]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Confidence and rightness of every word that was heard."""
    sure: list[float] = []
    right: list[bool] = []
    for utterance in utterances:
        words = recognizer.transcribe(utterance.audio_filepath).words
        text = " ".join(w.text for w in words)
        chunks = jiwer.process_words(utterance.text, text).alignments[0]
        equal = [range(c.hyp_start_idx, c.hyp_end_idx) for c in chunks if c.type == "equal"]
        right += [any(i in span for span in equal) for i in range(len(words))]
        sure += [w.confidence for w in words]
    return np.array(sure), np.array(right)


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes."""
    if args.output_path:
        check_writable(args.output_path)
    recognizer = load(args.model_path, 1, beam_from_flags(args) or False, min_confidence=0)
    utterances = spread(read_test_data(args.test_data), args.limit)
    random = np.random.default_rng(args.seed)
    mixed = [utterances[i] for i in random.permutation(len(utterances))]
    off = np.abs(time_errors(recognizer, mixed, random))
    sure, right = confidences(recognizer, utterances)
    tenths = [(sure >= t / 10) & (sure < (t + 1) / 10 + (t == 9)) for t in range(10)]
    result: dict[str, Any] = {
        "utterances": len(utterances), "borders": len(off),
        "time_median": float(np.median(off)), "time_p95": float(np.percentile(off, 95)),
        "words": len(sure), "errors": float(1 - right.mean()),
        "sure_share": float((sure >= SURE).mean()),
        "sure_errors": float(1 - right[sure >= SURE].mean()),
        "tenths": [
            {"from": t / 10, "words": int(part.sum()), "right": float(right[part].mean()),
             "confidence": float(sure[part].mean())}
            for t, part in enumerate(tenths) if part.any()
        ],
    }  # fmt: skip
    print(
        f"{len(off)} borders of words: {1000 * result['time_median']:.0f} ms off (95 %: "
        f"{1000 * result['time_p95']:.0f} ms)\n{len(sure)} words, {result['errors']:.1%} wrong; of "
        f"the {result['sure_share']:.0%} with confidence {SURE} or more {result['sure_errors']:.1%}"
    )
    if args.output_path:
        about = {
            "model": portable_path(args.model_path or "the English model that ships"),
            "test_data": portable_path(args.test_data),
        }
        write_json(args.output_path, about | provenance(args.command, args.seed) | result)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
