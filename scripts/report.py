"""Puts the results of evaluate.py side by side: a table, and plots of error against size and time.

    python scripts/report.py experiments/an4 --output_dir runs/report

Writes report.md (one row a technique: size, WER, latency, memory of its .pt and .onnx) and the
plots wer_size.png and wer_latency.png. The table can go into another file's section instead:
scripts/report.py experiments/an4 --insert experiments/an4/README.md --section an4

    python scripts/report.py --final runs/distilled --target_size_reduction 0.5

writes the final report of a recipe's stages anew, with these targets.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asr.common.provenance import command_line, commit
from asr.measure import final_report
from asr.measure.final_report import Targets, add_targets, targets_from
from asr.measure.plots import PLOTS, plot
from asr.measure.report import by_set, insert, markdown
from asr.measure.results import (
    by_test_data,
    find_baseline,
    read_reference,
    read_results,
    read_speed,
)
from asr.runtime.cli import Parser, guarded
from asr.runtime.files import write_atomically


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("results", nargs="*", help="result files of evaluate.py, or folders with such")
    add("--final", metavar="FOLDER", help="output folder of compress.py --recipe: its final report")
    add_targets(parser.add_argument_group("targets", "What the last stage of --final is to reach."))
    add("--baseline", default="", metavar="NAME",
        help="the result to compare with (default: one named baseline or float)")  # fmt: skip
    add("--reference", help="figures to set beside ours, such as experiments/design.json")
    add("--speed", metavar="FILE",
        help="times of scripts/benchmark.py infer in place of those of the results")  # fmt: skip
    add("--sets", action="store_true", help="only the error rates of each test set")
    add("--output_dir", help="folder for report.md and the plots; without it the table is printed")
    add("--insert", metavar="FILE", help="Markdown file that gets the table instead of report.md")
    add("--section", metavar="NAME",
        help="its place there: from <!-- results: NAME --> to <!-- end -->")  # fmt: skip
    args = parser.parse_args(argv)
    args.targets = targets_from(vars(args))
    if bool(args.results) == bool(args.final):
        parser.error("give either results or --final FOLDER")
    if args.targets != Targets() and not args.final:
        parser.error("targets go with --final")
    args.command = command_line("scripts/report.py", argv)
    return args


def final(args: argparse.Namespace) -> int:
    """The final report of a pipeline's folder."""
    stages = final_report.read_stages(Path(args.final))
    about = {"command": args.command, "commit": commit()}
    written = final_report.write(Path(args.final), stages, args.targets, about)
    print(final_report.markdown(stages, args.targets))
    print("written: " + ", ".join(map(str, written)))
    return 0


def run(args: argparse.Namespace) -> int:
    if args.final:
        return final(args)
    if bool(args.insert) != bool(args.section):
        raise ValueError("--insert FILE and --section NAME go together; give both or neither")
    results = read_results(args.results)
    reference = read_reference(args.reference) if args.reference else None
    speed = read_speed(args.speed) if args.speed else None
    sides = (args.baseline, reference, speed)
    text = by_set(results) if args.sets else markdown(results, *sides)
    written: list[Path] = []
    if args.insert:
        write_atomically(args.insert, insert(args.insert, args.section, text))
        written.append(Path(args.insert))
    elif args.output_dir:
        written.append(Path(args.output_dir) / "report.md")
        write_atomically(written[0], f"# Results\n\n{text}")
    else:
        print(f"# Results\n\n{text}", end="")
    if not args.sets:
        names = [find_baseline(group, args.baseline) for group in by_test_data(results).values()]
        print(f"compared with: {', '.join(dict.fromkeys(names))} (--baseline NAME for another)")
    if not written:
        return 0
    if args.output_dir:
        folder = Path(args.output_dir)
        drawn = [speed.of(result) for result in results] if speed else results
        groups = list(by_test_data(drawn).values())
        for number, group in enumerate(groups, 1):
            place = folder if len(groups) == 1 else folder / f"plots_{number}"
            place.mkdir(parents=True, exist_ok=True)
            written += [place / name for name in PLOTS if plot(group, place / name)]
    print("written: " + ", ".join(str(path) for path in written))
    return 0


def main(argv: list[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
