"""Makes a trained checkpoint smaller: a checkpoint and a method in, a smaller checkpoint out.

    python compress.py --model_path model.pt --method quantization --output_dir runs/int8

Or several methods in order (--recipe): each stage keeps its checkpoint and figures in OUTPUT_DIR,
the same command goes on where it was stopped, and final_report.md sums up. Or the mix of settings
that fits a size (--target_size_mb), a latency (--target_latency_ms) or an error rate
(--max_wer_increase). Under torchrun, training takes all processes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import Field, fields
from types import ModuleType
from typing import Any

from asr.measure.final_report import add_targets
from asr.network.processes import process_group
from asr.runtime.cli import Parser, add_flag, add_flags, guarded, number
from compress import finetuning
from compress.registry import methods
from compress.run import CHECKPOINT, REPORT, compress


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of `compress`: the flags that were given."""
    available = methods()
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--method", choices=available, help="what to do; several in order by --recipe")
    add("--recipe", metavar="FILE", help="JSON or TOML: a list of steps, each a method and options")
    add("--model_path", required=True, help="the checkpoint to compress")
    add("--output_dir", help=f"folder for {CHECKPOINT} and {REPORT}")
    add("--calibration_data", default="", help="speech for the options that look at activations")
    add("--test_data", help="export before and after, and measure both .onnx on this speech")
    add("--threads", type=int, default=0,
        help="processor threads (default: the idle cores but one, at least 1)")  # fmt: skip
    add("--target_size_mb", type=number, default=0.0, help="mix settings for a file of this size")
    add("--max_wer_increase", type=number, help="mix settings for this relative rise of dev WER")
    add("--dev_data", default="", help="speech to measure that on (default: dev data of training)")
    add("--sensitivity", default="", metavar="FILE", help="scan of scripts/sensitivity.py for this")
    add("--dry_run", action="store_true", help="show what would happen, layer by layer")
    text = "Checked in the report of a --recipe; --target_latency_ms without one mixes settings."
    add_targets(parser.add_argument_group("targets", text))
    add_options(parser, available)
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**given)


def add_options(parser: Parser, available: dict[str, ModuleType]) -> None:
    """A group of flags a method, those of several in one of their own."""
    owners: dict[str, dict[str, Field[Any]]] = {}
    for method, module in available.items():
        for f in fields(module.Config):
            owners.setdefault(f.name, {})[method] = f
    shared = {name: takers for name, takers in owners.items() if len(takers) > 1}
    group = parser.add_argument_group("several methods", "Options of more than one method.")
    for takers in shared.values():
        texts: dict[str, list[str]] = {}
        for method, f in takers.items():
            texts.setdefault(f.metadata["help"], []).append(method)
        text = "; ".join(f"{', '.join(methods)}: {text}" for text, methods in texts.items())
        add_flag(group, next(iter(takers.values())), text)
    for method, module in available.items():
        group = parser.add_argument_group(method, (module.__doc__ or "").splitlines()[0])
        add_flags(group, module.Config, skip=shared)
    group = parser.add_argument_group("fine-tuning", (finetuning.__doc__ or "").splitlines()[0])
    add_flags(group, finetuning.Options)


def run(args: argparse.Namespace) -> int:
    with process_group("auto"):
        compress(**vars(args))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
