"""Draws the training curve of a run.

    python scripts/plot_training.py RUN/log.jsonl --output_path curve.png

Several logs are drawn one after the other, as a run and its continuation.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asr.runtime.cli import Parser, guarded


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("logs", nargs="+", help="log.jsonl files that train.py wrote, in order")
    parser.add_argument("--output_path", required=True, help="the PNG to write")
    parser.add_argument("--title", default="", help="above the plot")
    return parser.parse_args(argv)


def read_logs(paths: list[str]) -> list[dict[str, Any]]:
    """All entries, with steps counted on from log to log; a ValueError names a broken line."""
    entries: list[dict[str, Any]] = []
    for path in paths:
        offset = entries[-1]["step"] if entries else 0
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            try:
                entry = json.loads(line)
                entries.append({**entry, "step": entry["step"] + offset})
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number}: not a line of a training log") from None
    if not entries:
        raise ValueError(f"{' '.join(paths)}: no training steps in it yet")
    return entries


def run(args: argparse.Namespace) -> int:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = read_logs(args.logs)
    figure, left = plt.subplots(figsize=(8, 4.5), layout="constrained")
    loss = [(e["step"], e["loss"]) for e in entries if "loss" in e]
    dev = [(e["step"], 100 * e["dev_wer"], 100 * e["dev_cer"]) for e in entries if "dev_wer" in e]
    left.plot(*zip(*loss, strict=True), color="tab:gray", linewidth=0.8, label="training loss")
    left.set(xlabel="optimiser steps", ylabel="loss a token", ylim=(0, None), title=args.title)
    right = left.twinx()
    if dev:
        steps, wer, cer = zip(*dev, strict=True)
        right.plot(steps, wer, "o-", markersize=3, color="tab:blue", label="dev WER")
        right.plot(steps, cer, "o-", markersize=3, color="tab:orange", label="dev CER")
    right.set(ylabel="error rate, %", ylim=(0, 100))
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(args.output_path, dpi=120)
    print(f"wrote {args.output_path}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
