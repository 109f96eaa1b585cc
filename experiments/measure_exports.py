"""Measures what exported files cost a device: loading, processor time of a run, memory, bytes.

    python experiments/measure_exports.py --models runs/*/model.onnx --output_path exports.json

Processor time, not latency: on a machine that others use it is what a run takes of one core, less
disturbed. One thread, runs interleaved; the ratios are to the first model. Of each .onnx the
checkpoint is the model.pt beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asr.common.provenance import command_line, portable_path
from asr.measure.machine import provenance
from asr.measure.timing import peak_memory
from asr.runtime.backends import open_session
from asr.runtime.cli import Parser, guarded
from asr.runtime.files import check_writable, write_json

SERVE = "serve"  # a process of its own, for one model
SECONDS = 10.0  # of features at 100 frames a second


def serve(path: str) -> None:
    """Loads the model, then runs it once for every line of standard input."""
    import time

    import numpy as np
    import onnxruntime  # noqa: F401  loading does not include its import

    before, start = peak_memory(), time.process_time()
    session = open_session(Path(path), threads=1)
    print(json.dumps([time.process_time() - start, before, peak_memory()]), flush=True)
    frames = int(100 * SECONDS) + 1
    features = np.random.default_rng(0).standard_normal((1, 80, frames), np.float32)
    for _ in sys.stdin:
        start = time.process_time()
        session.run(None, {"audio_signal": features, "length": np.array([frames])})
        print(json.dumps([time.process_time() - start, peak_memory()]), flush=True)


class Loaded:
    """A model in a process of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.process = subprocess.Popen(
            [sys.executable, __file__, SERVE, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.load, self.interpreter, self.loaded = self.answer()
        self.runs: list[float] = []

    def answer(self) -> Any:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def run(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds, self.peak = self.answer()
        self.runs.append(seconds)

    def row(self, first: Loaded) -> dict[str, Any]:
        pt = self.path.with_name("model.pt")
        return {
            "model": portable_path(str(self.path)),
            "cpu_seconds": round(median(self.runs[1:]), 4),
            "fastest": round(min(self.runs), 4),
            "faster": round(median(first.runs[1:]) / median(self.runs[1:]), 3),
            "load_cpu_seconds": round(self.load, 3),
            "interpreter_bytes": self.interpreter,
            "loaded_peak_bytes": self.loaded,
            "peak_bytes": self.peak,
            "onnx_bytes": self.path.stat().st_size,
            "pt_bytes": pt.stat().st_size if pt.exists() else None,
        }


def run(args: argparse.Namespace) -> int:
    check_writable(args.output_path)
    models = [Loaded(path) for path in args.models]
    for _ in range(args.rounds):
        for model in models:
            model.run()
    rows = [model.row(models[0]) for model in models]
    for row in rows:
        print(row)
    about = {"seconds": SECONDS, "rounds": args.rounds, "results": rows}
    write_json(args.output_path, provenance(args.command, 0) | about)
    for model in models:
        assert model.process.stdin
        model.process.stdin.close()
        model.process.wait()
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--models", nargs="+", type=Path, required=True, help=".onnx files; ratios are to the first"
    )
    add("--output_path", required=True, help="JSON to write")
    add("--rounds", type=int, default=11, help="runs of each, interleaved (%(default)s)")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds} must be at least 2: the first is a warm-up")
    for path in args.models:
        if not path.is_file():
            parser.error(f"{path}: no such model")
    args.command = command_line("experiments/measure_exports.py", argv)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    if sys.argv[1:2] == [SERVE]:
        serve(sys.argv[2])
    else:
        sys.exit(main())
