"""Measures speed, of training or of models side by side.

python scripts/benchmark.py train --preset base
python scripts/benchmark.py infer --model_path A.pt B.onnx
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import soundfile

from asr.common.provenance import command_line, commit, portable_path
from asr.corpus.splits import load_splits
from asr.measure.benchmark import RATE, infer_speed, noise, synthetic_speech
from asr.measure.machine import busy_cores, busy_note, default_threads, describe_machine
from asr.measure.timing import DEFINITION
from asr.runtime.cli import Parser, guarded, number
from asr.runtime.config import PRESETS
from asr.runtime.files import check_writable, write_json
from asr.training.train_config import TrainConfig

TRAIN = "seconds of audio trained a second, loading and augmentation included"
INFER = "latency and real-time factor of models on one recording, in interleaved rounds"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be above 0")
    return value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="what", required=True, help="what to measure")
    train = commands.add_parser("train", help=TRAIN, purpose=f"Measures {TRAIN}.")
    add = train.add_argument
    add("--data_dir", help="manifests or a LibriSpeech tree (default: synthetic WAV files)")
    add("--preset", nargs="+", choices=PRESETS, default=["base"],
        help="sizes of the model (default: base)")  # fmt: skip
    add("--precision", nargs="+", choices=("auto", "float32", "bf16"), default=["auto"],
        help="of the products (default: auto, bf16 where the processor has it)")  # fmt: skip
    add("--batch_size", nargs="+", type=positive, default=[16],
        help="utterances in a batch, one or several to try (default: 16)")  # fmt: skip
    add("--batch_seconds", type=number, default=240.0,
        help="most seconds of audio in a batch, as in train.py (default: 240)")  # fmt: skip
    add("--num_workers", type=int, default=2, help="processes that read audio (default: 2)")
    add("--threads", type=int, default=0,
        help="processor threads; 0 leaves the choice to PyTorch (default: 0)")  # fmt: skip
    add("--device", default="auto", help="cpu, cuda (default: a GPU if there is one)")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--steps", type=positive, default=20, help="steps that are measured (default: 20)")
    add("--warmup", type=positive, default=5, help="steps before them (default: 5)")
    infer = commands.add_parser("infer", help=INFER, purpose=f"Measures {INFER}.")
    add = infer.add_argument
    add("--model_path", nargs="+", required=True, help=".pt or .onnx; ratios are to the first")
    add("--audio_path", help="a recording (default: 10 s of noise)")
    add("--threads", nargs="+", type=positive, 
        help="processor threads to try (default: 1, and the idle cores but one)")  # fmt: skip
    add("--rounds", type=positive, default=20, help="rounds that are measured (default: 20)")
    for command in (train, infer):
        command.add_output_path("JSON with the results")
    args = parser.parse_args(argv)
    args.command = command_line("scripts/benchmark.py", argv)
    return args


def train(args: argparse.Namespace) -> list[dict[str, Any]]:
    configs = [
        TrainConfig(
            batch_size=size, batch_seconds=args.batch_seconds, precision=precision,
            device=args.device, num_workers=args.num_workers, threads=args.threads,
            compile=args.compile, tensorboard=False,
        )
        for precision in args.precision
        for size in args.batch_size
    ]  # fmt: skip
    needed = max(args.batch_size) * (args.steps + args.warmup)
    if args.data_dir:
        utterances = load_splits(args.data_dir).train
        return train_all(args, configs, [u for u in utterances if u.duration <= 35])
    with synthetic_speech(min(needed, 512)) as utterances:
        return train_all(args, configs, utterances)


def train_all(args: argparse.Namespace, configs: Any, utterances: Any) -> list[dict[str, Any]]:
    from asr.measure.training_speed import (
        train_speed,  # imports torch, which `infer` of an .onnx needs not
    )

    print("audio s/s: seconds of audio trained per second, median over steps, loading included;")
    print("waiting: share of the time without data; loader: its seconds per second when alone")
    print("preset  precision  batch  audio s/s  overall  waiting  loader  step")
    rows = []
    for preset in args.preset:
        for config in configs:
            row = train_speed(utterances, preset, config, args.steps, args.warmup)
            rows.append(row)
            print(
                f"{preset:6}  {row['precision']:9}  {config.batch_size:5}  "
                f"{row['audio_per_second']:9.1f}  {row['overall']:7.1f}  "
                f"{row['loader_share']:7.1%}  {row['loader_alone']:6.0f}  "
                f"{1e3 * row['step_seconds']:.0f} ms",
                flush=True,
            )
    return rows


def infer(args: argparse.Namespace) -> list[dict[str, Any]]:
    threads = args.threads or sorted({1, default_threads()})
    with tempfile.TemporaryDirectory() as folder:
        audio = args.audio_path or str(Path(folder) / "noise.wav")
        if not args.audio_path:
            soundfile.write(audio, noise(10.0, np.random.default_rng(0)), RATE)
        rows = infer_speed(args.model_path, audio, threads, args.rounds)
    print(DEFINITION)
    print(f"median of {args.rounds} interleaved rounds; speed-up against the first model")
    print("threads  latency  fastest     RTF  speed-up     MB  memory  model")
    for row in rows:
        print(
            f"{row['threads']:7}  {1e3 * row['latency']:4.0f} ms  {1e3 * row['fastest']:4.0f} ms  "
            f"{row['rtf']:.4f}  {row['speedup']:7.2f}x  {row['bytes'] / 1e6:5.1f}  "
            f"{row['peak_rss'] / 1e6:3.0f} MB  {row['model']}"
        )
        row["model"] = portable_path(row["model"])
    return rows


def run(args: argparse.Namespace) -> int:
    if args.output_path:
        check_writable(args.output_path)
    load = busy_cores()
    if busy_note(load):
        print(busy_note(load))
    result = {
        "results": train(args) if args.what == "train" else infer(args),
        "command": args.command,
        "commit": commit(),
        "machine": describe_machine() | {"load_before": load},
    }
    if args.output_path:
        write_json(args.output_path, result)
        print(f"written to {args.output_path}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
