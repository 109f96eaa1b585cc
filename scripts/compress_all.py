"""Compresses a model by every method and sets the results side by side: a table and plots.

    python scripts/compress_all.py --model_path model.pt --test_data test.json --output_dir runs/all

Every row is compressed, exported, and its .pt and .onnx are measured: size, word error rate with
its interval, latency, memory. With --fine_tune_epochs N the rows that profit from training are
trained: 16 clusters, int4 and half zeros for N epochs; ternary, int2, low rank and fewer channels
for 4 N. A run that was stopped goes on where it was: the same command again. In the folder:
report.md, wer_size.png, wer_latency.png, a result file of each model, speed.json and a folder of
each row.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asr.common.provenance import command_line
from asr.measure.evaluation import read_test_data
from asr.measure.plots import PLOTS, plot
from asr.measure.report import markdown
from asr.measure.results import by_test_data, read_results, read_speed
from asr.network.checkpoint import load_checkpoint
from asr.runtime.cli import Parser, guarded
from asr.runtime.files import check_writable, write_atomically
from compress.comparison import FLOAT, ROWS, Comparison, chosen


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_path", required=True, help="float checkpoint, e.g. model.pt")
    add("--test_data", required=True, nargs="+", help="manifests or LibriSpeech folders")
    add("--output_dir", required=True, help="folder for everything")
    add("--rows", nargs="+", default=[], metavar="ROW",
        help=f"only these (default: all that need no flag): {', '.join(ROWS)}")  # fmt: skip
    add("--fine_tune_epochs", type=int, default=0,
        help="epochs of training in the rows that profit from it, four times as many in those "
             "that change most (default: none)")  # fmt: skip
    add("--fine_tune_data", default="", help="speech to train on (default: the model's own)")
    add("--calibration_data", default="",
        help="speech that methods look at (default: the model's training data)")  # fmt: skip
    add("--no_calibration", action="store_true", help="methods look at no speech")
    add("--no_texts", action="store_true", help="write no texts to the results, only their counts")
    args = parser.parse_args(argv)
    if args.fine_tune_epochs < 0:
        parser.error(f"--fine_tune_epochs {args.fine_tune_epochs} must be at least 0")
    if args.fine_tune_data and not args.fine_tune_epochs:
        parser.error("--fine_tune_data goes with --fine_tune_epochs")
    if args.calibration_data and args.no_calibration:
        parser.error("--calibration_data goes without --no_calibration")
    args.command = command_line("scripts/compress_all.py", argv)
    return args


def run(args: argparse.Namespace) -> int:
    names = chosen(args.rows, bool(args.fine_tune_epochs))
    load_checkpoint(args.model_path)
    for path in args.test_data:
        read_test_data(path)
    folder = Path(args.output_dir)
    check_writable(folder / "report.md")
    rows = Comparison(
        Path(args.model_path), args.test_data, folder, args.calibration_data,
        not args.no_calibration, args.fine_tune_epochs, args.fine_tune_data, not args.no_texts,
    )  # fmt: skip
    rows.begin()
    left_out = {}
    for name in [FLOAT, *names]:
        print(f"== {name}" + (" is there already" if rows.is_made(name) else ""), flush=True)
        why = rows.make(name, args.command)
        if why:
            print(f"left out: {why}")
            left_out[name] = why
    names = [name for name in [FLOAT, *names] if name not in left_out]
    speed = read_speed(rows.time(names, args.command))
    results = read_results([path for name in names for path in rows.results(name)])
    text = "# Every method on one model\n\n" + markdown(results, FLOAT, speed=speed)
    text += "".join(f"\n{name} is left out: {why}\n" for name, why in left_out.items())
    write_atomically(folder / "report.md", text)
    for group in by_test_data([speed.of(result) for result in results]).values():
        for name in PLOTS:
            plot(group, folder / name)
    print(text)
    print(f"written: {folder / 'report.md'}, {' and '.join(PLOTS)} beside it")
    return 0


def main(argv: list[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
