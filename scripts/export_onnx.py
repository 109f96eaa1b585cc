"""Exports a checkpoint to ONNX, one file that runs without PyTorch.

    python scripts/export_onnx.py --model_path model.pt --output_path model.onnx

Packed weights (int4, int2, ternary, clusters) multiply in 8-bit integers, which is fast; with
`--compute float` they are unpacked to floats, which answers as the checkpoint does to the last
digit. The file is self-contained; `tokens.txt` beside it is for other runtimes. A comparison with
the checkpoint at several shapes is printed, and a file that differs is not written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import asr
from asr.runtime.cli import Parser, guarded


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    parser.add_argument("--model_path", required=True, help="checkpoint, e.g. model.pt")
    parser.add_argument("--output_path", required=True, help="file to write, e.g. model.onnx")
    parser.add_argument("--compute", choices=("int8", "float"), default="int8",
        help="how packed weights multiply (default: int8)")  # fmt: skip
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Exports, and prints what it does, sizes and the comparison."""
    tokens = Path(args.output_path).with_name("tokens.txt")
    earlier = tokens.read_bytes() if tokens.exists() else None
    print(f"exporting {args.model_path}: its graph is traced, which takes a while …", flush=True)
    made = asr.export_onnx(args.model_path, args.output_path, args.compute)
    if earlier not in (None, tokens.read_bytes()):
        print(
            f"note: {tokens} had other tokens and was replaced; other runtimes read it with every "
            f".onnx in {tokens.parent}: give models of other tokens folders of their own"
        )
    print(
        f"{args.model_path}: {made.checkpoint_bytes:,} bytes -> {made.path}: {made.bytes:,} bytes"
    )
    print("the file against the checkpoint, log-probabilities of B random inputs of T frames:")
    for row in made.parity:
        print(f"  {row}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
