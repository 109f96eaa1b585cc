"""Measures how compressed models answer held-out speech: what rows of the results are chosen by.

    python experiments/held_out.py --data ../shared/an4 --model_path float.pt compressed.pt ...

The speech is that of dev*, or without it what training holds out, never a test split. For every
model: the CTC loss a token, and the Kullback-Leibler divergence of a frame's answer from that of
the first model, in nats; each utterance by itself, in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.nn.functional as F

from asr.common.provenance import command_line, portable_path
from asr.measure.evaluation import made_by
from asr.measure.machine import provenance
from asr.network.checkpoint import load_checkpoint
from asr.runtime.cli import Parser, guarded
from asr.runtime.files import check_writable, write_json
from asr.training.data import BatchDataset, drop_impossible, plain_batches
from compress import calibration
from compress.core import Calibration
from compress.sensitivity import Outputs, distance, outputs


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_path", nargs="+", required=True, help="checkpoints; the first is the example")
    add("--data", required=True, help="what the models were trained on")
    parser.add_output_path("JSON with the numbers")
    args = parser.parse_args(argv)
    args.command = command_line("experiments/held_out.py", argv)
    return args


def ctc_loss(found: Outputs, speech: Calibration) -> float:
    """Sum of the utterances' CTC losses over their tokens, nats."""
    targets = [
        target[None, : int(n)]
        for batch in speech.batches
        for target, n in zip(batch.targets, batch.target_lengths, strict=True)
    ]
    total = 0.0
    for (log_probs, lengths), target in zip(found, targets, strict=True):
        sizes = lengths, target.new_tensor([target.shape[1]])
        total += float(F.ctc_loss(log_probs.transpose(0, 1), target, *sizes, reduction="sum"))
    return total / sum(target.shape[1] for target in targets)


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes."""
    if args.output_path:
        check_writable(args.output_path)
    first = load_checkpoint(args.model_path[0])
    held_out, _ = drop_impossible(
        calibration.speech(first, args.data, "dev"), first.tokenizer, first.features,
        first.model.config.total_factor,
    )  # fmt: skip
    dataset = BatchDataset(held_out, first.tokenizer, first.features)
    speech = Calibration([dataset[key] for key in plain_batches(held_out, 8)], args.data)
    example = outputs(first.model, speech)
    rows: list[dict[str, Any]] = []
    print(f"{len(held_out)} utterances\nCTC loss  divergence  model")
    for path in args.model_path:
        checkpoint = load_checkpoint(path)
        if checkpoint.tokenizer.tokens != first.tokenizer.tokens:
            raise ValueError(f"{path}: other tokens than those of {args.model_path[0]}")
        found = outputs(checkpoint.model, speech)
        row = {
            "model": portable_path(path), "ctc_loss": round(ctc_loss(found, speech), 5),
            "divergence": round(distance(found, example), 5),
            "made_by": [made_by(entry) for entry in checkpoint.history[-1:]],
        }  # fmt: skip
        rows.append(row)
        print(f"{row['ctc_loss']:8.4f}  {row['divergence']:10.4f}  {path}", flush=True)
    if args.output_path:
        about = {
            "data": portable_path(args.data), "utterances": len(held_out),
        }  # fmt: skip
        write_json(args.output_path, about | provenance(args.command, 0) | {"results": rows})
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
