"""Draws the training curves of runs, side by side where there are several.

    python scripts/plot_training.py runs/baseline runs/larger --output_path curves.png

A run is the folder that train.py wrote, or its log.jsonl. With --continued the runs are one run and
its continuations, drawn one after the other.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asr.measure.plots import readable_ticks
from asr.runtime.cli import Parser, guarded
from asr.runtime.files import check_writable

LOG = "log.jsonl"
Entries = list[dict[str, Any]]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help=f"folders of train.py, or {LOG} files")
    add("--output_path", required=True, metavar="FILE", help="the PNG to write")
    add("--title", default="", help="above the plot (default: the runs' names)")
    add("--continued", action="store_true", help="the runs, in order, are parts of one")
    return parser.parse_args(argv)


def read_log(path: Path) -> Entries:
    """The lines of a run's log; a ValueError names a broken one."""
    path = path / LOG if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"{path}: no such log; name a folder that train.py wrote, or its {LOG}")
    entries: Entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            entries.append({**entry, "step": entry["step"] + 0})
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: not a line of a training log") from None
    if not any("loss" in e or "dev_wer" in e for e in entries):
        raise ValueError(f"{path}: no training steps in it yet")
    return entries


def one_after_the_other(logs: list[Entries]) -> Entries:
    """The entries of all, with steps counted on from log to log."""
    joined: Entries = []
    for entries in logs:
        offset = joined[-1]["step"] if joined else 0
        joined += [{**e, "step": e["step"] + offset} for e in entries]
    return joined


def names_of(paths: list[Path]) -> list[str]:
    """What tells the runs apart: the folder of a log.jsonl, the stem of another file."""
    places = [p.resolve().parent if p.name == LOG else p.resolve().with_suffix("") for p in paths]
    short = [place.name for place in places]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def run(args: argparse.Namespace) -> int:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = [Path(path) for path in args.runs]
    logs, names = [read_log(path) for path in paths], names_of(paths)
    if args.continued:
        logs, names = [one_after_the_other(logs)], [" to ".join({names[0]: 0, names[-1]: 0})]
    check_writable(args.output_path)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    rates: list[float] = []
    for number, (name, entries) in enumerate(zip(names, logs, strict=True)):
        colour = f"C{number}"
        loss = [(e["step"], e["loss"]) for e in entries if "loss" in e]
        if loss:
            left.plot(*zip(*loss, strict=True), color=colour, linewidth=0.8)
        dev = [(e["step"], 100 * e["dev_wer"], 100 * e["dev_cer"]) for e in entries
               if "dev_wer" in e]  # fmt: skip
        best = f", best dev WER {min(wer for _, wer, _ in dev):.1f} %" if dev else ""
        right.plot([], [], color=colour, label=name + best)
        if dev:
            steps, wer, cer = zip(*dev, strict=True)
            right.plot(steps, wer, "o-", markersize=3, color=colour)
            right.plot(steps, cer, "--", linewidth=1, color=colour)
            rates += [*wer, *cer]
    left.set(xlabel="optimiser steps", ylabel="loss a token", title="training loss")
    right.set(xlabel="optimiser steps", ylabel="error rate (%)",
              title="dev set: WER (solid), CER (dashed)")  # fmt: skip
    if rates and max(rates) > 3 * min(rates) > 0:  # the end of a run is what one looks at
        right.set_yscale("log")
        readable_ticks(right.yaxis)
    for axes in (left, right):
        axes.grid(True, which="both", alpha=0.25)
    figure.suptitle(args.title or f"Training of {', '.join(names)}")
    figure.legend(loc="outside lower center", ncols=min(3, len(names)), frameon=False)
    figure.savefig(args.output_path, dpi=120)
    plt.close(figure)
    print(f"wrote {args.output_path}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
