"""Measures text while somebody speaks: how late words appear, how many last, what it costs.

    python experiments/check_live.py --test_data ../shared/LibriSpeech/dev-clean --limit 40 \
        --output_path experiments/live/single.json

Recordings are fed in chunks of a tenth of a second as a microphone would give them. The clock is
that of the sound and of the processor: a chunk is there when its sound has ended, and what is done
with it takes the processor time that it takes, so that a busy computer measures what an idle one
does. With --wall the sound is waited for and the clock is the computer's.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from asr.common.provenance import command_line, portable_path
from asr.measure.evaluation import read_test_data, spread
from asr.measure.machine import provenance
from asr.runtime.audio import Waveform, read_audio
from asr.runtime.capture import SECONDS
from asr.runtime.cli import Parser, guarded
from asr.runtime.files import check_writable, write_json
from asr.runtime.language_model import add_beam_flags, beam_from_flags
from asr.runtime.live import Event, Listener
from asr.runtime.recognizer import Recognizer, load
from asr.runtime.words import Word

NEAR = 0.4  # seconds between the middles of a word as it appears and as it ends up


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_path", help=".onnx or .pt model (default: the English one that ships)")
    add("--test_data", required=True, help="manifest or LibriSpeech folder")
    add("--limit", type=int, default=40, help="so many utterances of it (default: 40)")
    add("--join", type=int, default=1, help="so many as one, a second apart (default: 1)")
    add("--wall", action="store_true", help="wait for the sound as it would come")
    parser.add_output_path("JSON with the figures")
    add_beam_flags(parser)
    args = parser.parse_args(argv)
    args.command = command_line("experiments/check_live.py", argv)
    return args


def feed(recognizer: Recognizer, waveform: Waveform, wall: bool) -> tuple[list[Any], float]:
    """The events of a recording, each with the second in which it is there, and the work's seconds.

    The last one with what `finish` gives.
    """
    rate = recognizer.info.features.sample_rate
    listener, hop = Listener(recognizer, rate), int(SECONDS * rate)
    heard: list[tuple[float, Event]] = []
    free = work = 0.0  # when the processor has done all that came, how long it took
    began = time.monotonic()
    for at in range(0, len(waveform) + hop, hop):
        there = min(at + hop, len(waveform)) / rate
        if wall:
            time.sleep(max(0.0, began + there - time.monotonic()))
        start = time.process_time()
        done = listener.feed(waveform[at : at + hop]) if at < len(waveform) else listener.finish()
        events = list(done)
        took = time.process_time() - start
        work += took
        free = time.monotonic() - began if wall else max(free, there) + took
        heard += [(free, event) for event in events]
    return heard, work


def delays(
    heard: Sequence[tuple[float, Event]], words: Sequence[Word]
) -> tuple[list[float], list[float]]:
    """Seconds from the end of each final word until a word shows there, and until it does."""
    shown = [(when, w) for when, event in heard for w in event.segment.words]
    some, same = [], []
    for word in words:
        middle = (word.start + word.end) / 2
        there = [(when, w) for when, w in shown if w.start <= middle <= w.end]
        near = [(when, w) for when, w in shown if abs((w.start + w.end) / 2 - middle) < NEAR]
        some.append(there[0][0] - word.end)
        same.append(next(when for when, w in near if w.text == word.text) - word.end)
    return some, same


def measure(recognizer: Recognizer, recordings: Sequence[Waveform], wall: bool) -> dict[str, Any]:
    """Delay, share of the file's words and load over recordings."""
    late: list[float] = []
    settled: list[float] = []
    equal = total = 0
    work = seconds = 0.0
    for waveform in recordings:
        heard, took = feed(recognizer, waveform, wall)
        final = [w for _, event in heard if event.final for w in event.segment.words]
        file = [w.text for w in recognizer.transcribe(waveform).words]
        matcher = difflib.SequenceMatcher(None, file, [w.text for w in final], autojunk=False)
        equal += sum(block.size for block in matcher.get_matching_blocks())
        total += max(len(file), len(final))
        some, same = delays(heard, final)
        late, settled = late + some, settled + same
        work, seconds = work + took, seconds + len(waveform) / 16000
    return {
        "recordings": len(recordings), "seconds": round(seconds, 1), "words": total,
        "delay_median": float(np.median(late)), "delay_p95": float(np.percentile(late, 95)),
        "same_median": float(np.median(settled)), "same_p95": float(np.percentile(settled, 95)),
        "share_as_in_file": equal / total, "load": work / seconds,
    }  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes."""
    if args.output_path:
        check_writable(args.output_path)
    recognizer = load(args.model_path, threads=1, beam=beam_from_flags(args) or False)
    rate = recognizer.info.features.sample_rate
    chosen = spread(read_test_data(args.test_data), args.limit)
    waveforms = [read_audio(u.audio_filepath, rate) for u in chosen]
    pause = np.zeros(rate, np.float32)
    recordings = [
        np.concatenate([part for w in waveforms[at : at + args.join] for part in (w, pause)])
        for at in range(0, len(waveforms), args.join)
    ]
    result = measure(recognizer, recordings, args.wall)
    print(
        f"{result['words']} words in {result['seconds'] / 60:.1f} min: seen "
        f"{result['delay_median']:.2f} s after their end (95 %: {result['delay_p95']:.2f} s), as "
        f"they stay {result['same_median']:.2f} s ({result['same_p95']:.2f} s); "
        f"{result['share_as_in_file']:.1%} as in the file, {result['load']:.1%} of a core"
    )
    if args.output_path:
        about = {
            "model": portable_path(args.model_path or "the English model that ships"),
            "test_data": portable_path(args.test_data),
        }
        write_json(args.output_path, about | provenance(args.command) | result)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
