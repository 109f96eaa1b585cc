"""Sets students beside their teachers: accuracy, size, speed, agreement, and which for which use.

    python scripts/distillation_matrix.py plan.json --test_data data/test.json --output_dir runs/m

The plan names teachers and students, each with its .pt and .onnx and perhaps an int8 .onnx:
{"teachers": {"base": {"model": "base.pt", "onnx": "base.onnx"}}, "students": [{"name": "half",
"teacher": "base", "model": "half.pt", "onnx": "half.onnx", "int8": "half_int8.onnx"}]}.
Writes matrix.json, matrix.md and the heat map matrix.png.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import soundfile

from asr.common.provenance import command_line, portable_path
from asr.measure import matrix
from asr.measure.benchmark import RATE, infer_speed, noise
from asr.measure.evaluation import read_test_data
from asr.measure.flops import flops_per_second
from asr.measure.machine import provenance
from asr.runtime.cli import Parser, guarded
from asr.runtime.files import check_writable, write_atomically, write_json


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("plan", help="JSON file of teachers and students")
    add("--test_data", required=True, help="manifest or LibriSpeech folder with transcripts")
    add("--output_dir", required=True, help="folder for the three files")
    add("--limit", type=int, default=0, help="only the first so many utterances (default: all)")
    add("--rounds", type=int, default=10, help="of timing (default: 10)")
    args = parser.parse_args(argv)
    if args.limit < 0 or args.rounds < 1:
        parser.error("--limit must not be below 0, --rounds at least 1")
    args.command = command_line("scripts/distillation_matrix.py", argv)
    return args


def run(args: argparse.Namespace) -> int:
    plan = matrix.read_plan(args.plan)
    utterances = read_test_data(args.test_data)[: args.limit or None]
    folder = Path(args.output_dir)
    check_writable(folder / "matrix.json")
    students = [student for _, student in plan.pairs]
    timed = [path for e in (*plan.teachers, *students) for path in (e.onnx, e.int8) if path]
    timed = list(dict.fromkeys(timed))
    said = {path: matrix.listen(path, utterances)
            for path in dict.fromkeys(e.onnx for e in (*plan.teachers, *students))}  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        audio = Path(temporary) / "noise.wav"
        soundfile.write(audio, noise(10.0, np.random.default_rng(0)), RATE)
        times = {row["model"]: row["latency"]
                 for row in infer_speed(timed, audio, [1], args.rounds)}  # fmt: skip
    example = {entry.name: entry for entry in plan.teachers}
    rows = [
        matrix.compare(
            teacher, student, said[student.onnx], said[example[teacher].onnx], times,
            times[example[teacher].onnx], flops_per_second(student.onnx),
        )
        for teacher, student in plan.pairs
    ]  # fmt: skip
    about = provenance(args.command) | {
        "test_data": portable_path(args.test_data), "utterances": len(utterances),
    }  # fmt: skip
    write_json(folder / "matrix.json", about | matrix.as_json(rows))
    write_atomically(folder / "matrix.md", f"# Teachers and students\n\n{matrix.markdown(rows)}")
    matrix.heat_map(rows, folder / "matrix.png")
    print(matrix.markdown(rows))
    print(f"written: {folder / 'matrix.json'}, matrix.md and matrix.png beside it")
    return 0


def main(argv: list[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
