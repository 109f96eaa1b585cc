"""Imports a model of NVIDIA NeMo as a checkpoint.

    python scripts/import_model.py --model_path model.nemo --output_path model.pt

Takes Conformer-CTC, FastConformer-CTC and the CTC branch of hybrid models. The result trains,
compresses, exports and transcribes as one of this project's own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asr.importing.nemo import check_model, import_nemo
from asr.importing.onnx_file import import_onnx
from asr.network.checkpoint import Checkpoint, save_checkpoint
from asr.network.model import count_parameters
from asr.runtime.audio import read_audio
from asr.runtime.cli import Parser, guarded
from asr.runtime.files import check_writable


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(
        __doc__,
        epilog="Every weight is used or the import fails by the name of what does not fit.",
    )
    add = parser.add_argument
    add("--model_path", required=True, help=".nemo archive, or a folder of its parts")
    add("--output_path", required=True, help="checkpoint to write, e.g. model.pt")
    add("--language", default="", help="of a multilingual model, e.g. hi")
    add("--frontend", choices=("old", "new"), default="",
        help="ends of a recording: old as in NeMo up to 2.4 (mirrored, one frame more), new as in "
        "later ones (default: by the version in the archive)")  # fmt: skip
    add("--audio_path", help="a recording to read at the end")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Imports, checks, writes, and says what can be done next."""
    output = Path(args.output_path)
    if output.suffix != ".pt":
        raise ValueError(f"{output}: the name of a checkpoint must end in .pt")
    if output.exists():
        raise ValueError(f"{output}: is there already; choose another --output_path")
    check_writable(output)
    if Path(args.model_path).suffix == ".onnx":
        if args.language or args.frontend:
            raise ValueError("--language and --frontend are for .nemo archives")
        imported = import_onnx(args.model_path)
    else:
        imported = import_nemo(args.model_path, args.language, args.frontend)
    checkpoint = imported.checkpoint
    rate = checkpoint.features.sample_rate
    clip = read_audio(args.audio_path, rate) if args.audio_path else None
    text = check_model(checkpoint, clip)
    save_checkpoint(output, checkpoint)
    print(describe(checkpoint))
    for note in imported.notes:
        print(f"note: {note}")
    if args.audio_path:
        print(f"{args.audio_path}: {text}")
    print(f"{output}: {output.stat().st_size:,} bytes; checked on silence and on a voice\nnext:")
    folder = output.with_suffix("")
    print(f"  python transcribe.py --model_path {output} --audio_path RECORDING")
    print(f"  python compress.py --method quantization --model_path {output} "
          f"--output_dir {folder}_int8")  # fmt: skip
    print(f"  python scripts/export_onnx.py --model_path {folder}_int8/model.pt "
          f"--output_path {folder}_int8.onnx")  # fmt: skip
    return 0


def describe(checkpoint: Checkpoint) -> str:
    """Size, dimensions and frontend in one line each."""
    model, features = checkpoint.model.config, checkpoint.features
    edge = "n // hop + 1" if features.last_frame else "n // hop"
    return (
        f"{count_parameters(checkpoint.model) / 1e6:.1f} M parameters: {model.n_layers} blocks of "
        f"{model.d_model}, {model.n_heads} heads, kernel {model.conv_kernel_size}, "
        f"{model.subsampling} {model.subsampling_factor}x, {model.vocab_size} tokens\n"
        f"frontend: {features.n_mels} mels at {features.sample_rate} Hz, {edge} frames, "
        f"{features.padding} beyond the ends, normalisation {features.normalization}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
