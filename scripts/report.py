"""Puts results side by side: scripts/report.py experiments --output_dir experiments

Writes report.md (size, ratio, WER, ΔWER, latency, speed-up) and the plots wer_size.png and
wer_latency.png with the Pareto front.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asr.cli import guarded
from asr.manifest import write_atomically
from asr.report import PLOTS, by_test_data, find_baseline, markdown, plot, read_results


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("results", nargs="+", help="result files of evaluate.py, or folders with such")
    add("--baseline", default="", help="name of the float model's result (default: found by name)")
    add("--output_dir", help="folder for report.md and the plots; without it the table is printed")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    results = read_results(args.results)
    text = markdown(results, args.baseline)
    if not args.output_dir:
        print(text, end="")
        return 0
    folder = Path(args.output_dir)
    groups = list(by_test_data(results).values())
    write_atomically(folder / "report.md", text)
    written = [folder / "report.md"]
    for number, group in enumerate(groups, 1):
        find_baseline(group, args.baseline)
        place = folder if len(groups) == 1 else folder / f"plots_{number}"
        place.mkdir(parents=True, exist_ok=True)
        written += [place / name for name in PLOTS if plot(group, place / name)]
    print("written: " + ", ".join(str(path) for path in written))
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return guarded(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
