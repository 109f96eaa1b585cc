"""Speed of the presets with 8x subsampling beside those with 4x, random weights, one thread.

    python experiments/speed/presets.py --output_path experiments/speed/presets.json

Each preset is exported as float32 and as int8; all files read the same 10 s of noise in turn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import soundfile
import torch

from asr.common.provenance import command_line
from asr.measure.benchmark import RATE, infer_speed, noise
from asr.measure.machine import busy_cores, provenance
from asr.network.checkpoint import Checkpoint
from asr.network.export import to_onnx
from asr.network.model import ConformerCTC, count_parameters
from asr.runtime.cli import Parser, guarded
from asr.runtime.config import preset
from asr.runtime.files import check_writable, write_json
from asr.runtime.tokenizer import BLANK, Tokenizer
from compress import core
from compress.recipes import make_step

SEED, TOKENS, SECONDS = 0, 128, 10.0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--presets", default="small,fast_small", help="commas between; ratios are to the first")
    add("--rounds", type=int, default=20, help="interleaved rounds that are measured (default: 20)")
    parser.add_output_path("JSON with the results")
    args = parser.parse_args(argv)
    args.command = command_line("experiments/speed/presets.py", argv)
    return args


def export(name: str, folder: Path) -> dict[Path, int]:
    """A preset as float32 and int8 .onnx of random weights, and its parameters."""
    torch.manual_seed(SEED)
    model = ConformerCTC(preset(name, vocab_size=TOKENS)).eval()
    parameters = count_parameters(model)
    tokenizer = Tokenizer([BLANK, *(chr(0x4E00 + i) for i in range(TOKENS - 1))])
    checkpoint = Checkpoint(model, tokenizer)
    files = {}
    for precision in ("float32", "int8"):
        if precision == "int8":
            checkpoint = core.run(checkpoint, [make_step("quantization", {})])
        path = folder / f"{name}_{precision}" / "model.onnx"
        to_onnx(checkpoint, path)
        files[path] = parameters
    return files


def run(args: argparse.Namespace) -> int:
    """Exports, measures, prints and writes."""
    if args.output_path:
        check_writable(args.output_path)
    with tempfile.TemporaryDirectory() as place:
        audio = Path(place) / "noise.wav"
        soundfile.write(audio, noise(SECONDS, np.random.default_rng(SEED)), RATE)
        files: dict[Path, int] = {}
        for name in args.presets.split(","):
            files |= export(name, Path(place))
        load = busy_cores()
        rows = infer_speed(list(files), audio, [1], args.rounds)
    for row, (path, parameters) in zip(rows, files.items(), strict=True):
        row |= {"model": path.parent.name, "parameters": parameters}
        print(f"{row['model']}: {1000 * row['latency']:.0f} ms, {row['speedup']:.2f}x")
    if args.output_path:
        about = provenance(args.command, SEED) | {"seconds_of_audio": SECONDS, "load_before": load}
        write_json(args.output_path, about | {"results": rows})
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
