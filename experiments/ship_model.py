"""Writes the files that ship.

    python experiments/ship_model.py --model_path model.pt --output_dir experiments/librispeech

`model_fp16.pt` to fine-tune and compress from, `model_int8.onnx` (with `tokens.txt`) to transcribe
with. The checkpoint's history stays; paths of the machine that trained it do not.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asr.network.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from asr.network.export import to_onnx
from asr.runtime.cli import Parser, guarded
from compress import core, recipes


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    parser.add_argument("--model_path", required=True, help="float checkpoint, e.g. model.pt")
    parser.add_argument("--output_dir", required=True, help="folder for the files that ship")
    return parser.parse_args(argv)


def without_places(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without its data's path, resume state, and paths within its history."""
    return replace(checkpoint, data={}, training=None, history=placeless(checkpoint.history))


def placeless(value: Any) -> Any:
    """The value without the paths in it, at any depth of lists and dicts."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not (is_place(k) or is_place(v))}
        return {k: placeless(v) for k, v in kept.items()}
    if isinstance(value, list | tuple):
        return type(value)(placeless(v) for v in value if not is_place(v))
    return value


def is_place(value: Any) -> bool:
    return isinstance(value, str) and ("/" in value or "\\" in value)


def compressed(checkpoint: Checkpoint, precision: str) -> Checkpoint:
    """A copy quantized to `precision`."""
    own = replace(checkpoint, model=copy.deepcopy(checkpoint.model))
    return core.run(own, [recipes.make_step("quantization", {"precision": precision})])


def run(args: argparse.Namespace) -> int:
    """Writes the files and prints their sizes."""
    checkpoint = without_places(load_checkpoint(args.model_path))
    folder = Path(args.output_dir)
    half, integers = folder / "model_fp16.pt", folder / "model_int8.onnx"
    save_checkpoint(half, compressed(checkpoint, "fp16"))
    rows = to_onnx(compressed(checkpoint, "int8"), integers)
    for path in (half, integers):
        print(f"{path}: {path.stat().st_size:,} bytes")
    for row in rows:
        print(f"  {row}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
