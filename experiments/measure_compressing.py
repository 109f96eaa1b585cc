"""Measures what compressing itself takes.

    python experiments/measure_compressing.py --preset large

Every post-training method in a process of its own, on a model with random weights: seconds and peak
memory of the whole command, bytes of the result. Calibration speech is noise: it costs as much.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from asr.common.provenance import command_line, commit
from asr.measure.benchmark import synthetic_speech
from asr.measure.machine import busy_cores, busy_note, describe_machine
from asr.network.checkpoint import Checkpoint, save_checkpoint
from asr.network.model import ConformerCTC
from asr.runtime.cli import Parser, guarded
from asr.runtime.config import PRESETS, preset
from asr.runtime.files import check_writable, write_json
from asr.runtime.tokenizer import Tokenizer

COMPRESS = Path(__file__).resolve().parents[1] / "compress.py"
QUANTIZATION = ("--method", "quantization", "--precision")
PRUNING = ("--method", "pruning")
FACTORIZATION = ("--method", "factorization", "--size_ratio", "2.2")
CLUSTERING = ("--method", "clustering", "--num_clusters")
METHODS: dict[str, tuple[str, ...]] = {
    "fp16": (*QUANTIZATION, "fp16"),
    "int8": (*QUANTIZATION, "int8"),
    "int4": (*QUANTIZATION, "int4"),
    "int4_aware": (*QUANTIZATION, "int4", "--activation_aware"),
    "int2": (*QUANTIZATION, "int2"),
    "int2_aware": (*QUANTIZATION, "int2", "--activation_aware"),
    "ternary": (*QUANTIZATION, "ternary"),
    "ternary_aware": (*QUANTIZATION, "ternary", "--activation_aware"),
    "unstructured_50": (*PRUNING, "--sparsity", "0.5"),
    "unstructured_50_taylor": (*PRUNING, "--sparsity", "0.5", "--importance", "taylor"),
    "structured_30": (*PRUNING, "--pruning_type", "structured", "--sparsity", "0.3"),
    "structured_30_taylor": (
        *PRUNING, "--pruning_type", "structured", "--sparsity", "0.3", "--importance", "taylor",
    ),
    "low_rank": FACTORIZATION,
    "low_rank_aware": (*FACTORIZATION, "--activation_aware"),
    "clustering_256": (*CLUSTERING, "256"),
    "clustering_16": (*CLUSTERING, "16"),
    "clustering_16_entropy": (*CLUSTERING, "16", "--entropy_coding"),
    "clustering_16_aware": (*CLUSTERING, "16", "--codebooks", "16", "--activation_aware"),
}  # fmt: skip
CALIBRATION_FILES = 64


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="large", help="size of the model (default: large)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS),
        help="what to measure (default: all)")  # fmt: skip
    parser.add_output_path("JSON with the results")
    args = parser.parse_args(argv)
    args.command = command_line("experiments/measure_compressing.py", argv)
    return args


def save_random_model(path: Path, name: str) -> None:
    """Writes a checkpoint of a preset with random weights, seed 0; `measure_small.sh` does too."""
    tokenizer = Tokenizer.characters()
    torch.manual_seed(0)
    model = ConformerCTC(preset(name, vocab_size=len(tokenizer))).eval()
    save_checkpoint(path, Checkpoint(model, tokenizer))


def measure(method: str, model: Path, speech: Path, folder: Path) -> dict[str, Any]:
    """Runs compress.py; its seconds, its peak memory in bytes, the bytes of its file."""
    flags = METHODS[method]
    if any("aware" in flag or flag == "taylor" for flag in flags):
        flags = (*flags, "--calibration_data", str(speech))
    command = [sys.executable, str(COMPRESS), *flags]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--model_path", str(model), "--output_dir", str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = said.strip().splitlines()[-1:] or [f"ended with {process.returncode}"]
        raise ValueError(f"{method}: {last[0]}")
    kilobyte = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
    return {
        "method": method,
        "flags": " ".join(METHODS[method]),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_rss": usage.ru_maxrss * kilobyte,
        "bytes": (folder / "model.pt").stat().st_size,
    }


def run(args: argparse.Namespace) -> int:
    if args.output_path:
        check_writable(args.output_path)
    load = busy_cores()
    if busy_note(load):
        print(busy_note(load))
    rows = []
    with tempfile.TemporaryDirectory() as name, synthetic_speech(CALIBRATION_FILES) as utterances:
        folder = Path(name)
        model, speech = folder / "model.pt", folder / "train.json"
        save_random_model(model, args.preset)
        speech.write_text("".join(json.dumps(asdict(u)) + "\n" for u in utterances))
        print("seconds  memory      file  method")
        for method in args.methods:
            row = measure(method, model, speech, folder / method)
            rows.append(row)
            print(
                f"{row['seconds']:7.1f}  {row['peak_rss'] / 1e9:3.1f} GB  "
                f"{row['bytes'] / 1e6:5.1f} MB  {method}",
                flush=True,
            )
    result = {"preset": args.preset, "results": rows, "command": args.command, "commit": commit()}
    if args.output_path:
        machine = describe_machine() | {"load_before": load}
        write_json(args.output_path, result | {"seed": 0, "machine": machine})
        print(f"written to {args.output_path}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
