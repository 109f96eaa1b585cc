"""Averages the weights of checkpoints into one.

    python scripts/average_models.py --model_path A.pt B.pt --output_path M.pt

Runs that began from one model and went different ways (other data, another seed) often meet in an
average that is better than each (Wortsman et al. 2022, *Model soups*). Choose by dev data whether
and of which. Weights of float and fp16 models are averaged; the result is float32.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from asr.common.provenance import commit
from asr.network.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from asr.network.model import ConformerCTC
from asr.runtime.cli import Parser, guarded


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_path", nargs="+", required=True, metavar="PATH",
        help="two or more checkpoints of one size and one set of tokens")  # fmt: skip
    add("--output_path", required=True, help="file to write, e.g. model.pt")
    args = parser.parse_args(argv)
    if len(args.model_path) < 2:
        parser.error("--model_path takes two checkpoints or more")
    return args


def average(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> ConformerCTC:
    """A float32 model with the mean of the weights and of the batch norms' statistics.

    Raises ValueError, with the name, for one of other dimensions or tokens, or without plain
    weights (of integers, or low rank).
    """
    first = checkpoints[0]
    model = ConformerCTC(first.model.config)
    total = {key: torch.zeros_like(v, dtype=torch.float64) for key, v in model.state_dict().items()}
    for checkpoint, name in zip(checkpoints, names, strict=True):
        state: dict[str, Tensor] = checkpoint.model.state_dict()
        shapes = {key: value.shape for key, value in state.items()}
        if checkpoint.tokenizer.tokens != first.tokenizer.tokens:
            raise ValueError(f"{name}: has other tokens than {names[0]}")
        if checkpoint.model.config != first.model.config:
            raise ValueError(f"{name}: has other dimensions than {names[0]}")
        if shapes != {key: value.shape for key, value in total.items()}:
            raise ValueError(f"{name}: is compressed; average the models it was made from")
        for key, value in state.items():
            total[key] += value.double() / len(checkpoints)
    model.load_state_dict({key: v.to(model.state_dict()[key].dtype) for key, v in total.items()})
    return model.eval()


def run(args: argparse.Namespace) -> int:
    """Averages and writes; the history is the first model's, and the digests of all."""
    output = Path(args.output_path)
    if output.exists():
        raise ValueError(f"{output}: is there already; choose another --output_path")
    checkpoints = [load_checkpoint(path) for path in args.model_path]
    digests = [hashlib.sha256(Path(p).read_bytes()).hexdigest()[:12] for p in args.model_path]
    entry = {"step": "average", "config": {"models": " ".join(digests)}, "commit": commit()}
    first = checkpoints[0]
    model = average(checkpoints, args.model_path)
    save_checkpoint(
        output, replace(first, model=model, training=None, history=[*first.history, entry])
    )
    print(f"{output}: the average of {len(checkpoints)} models")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
