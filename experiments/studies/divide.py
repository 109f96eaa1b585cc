"""Divides a manifest in two by chance: so many utterances with texts, and the others.

    python experiments/studies/divide.py ../shared/an4/train.json \\
        --labelled 300 --output_dir runs/few

Writes OUTPUT_DIR/train.json and OUTPUT_DIR/others.json. A study distils with the texts of the first
alone, and with the recordings of the others as well.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from asr.corpus.manifest import read_manifest, write_manifest
from asr.runtime.cli import Parser, guarded


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("manifest", help="what to divide")
    add("--labelled", type=int, required=True, help="utterances of the first part")
    add("--seed", type=int, default=0, help="of the choice (%(default)s)")
    add("--output_dir", required=True, help="folder for the two manifests")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    utterances = read_manifest(args.manifest)
    if not 0 < args.labelled < len(utterances):
        raise ValueError(f"--labelled {args.labelled} must lie in 1..{len(utterances) - 1}")
    order = np.random.default_rng(args.seed).permutation(len(utterances))
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": order[: args.labelled], "others": order[args.labelled :]}
    for name, part in parts.items():
        write_manifest(folder / f"{name}.json", [utterances[i] for i in sorted(part)])
        seconds = sum(utterances[i].duration for i in part)
        print(f"{folder / name}.json: {len(part)} utterances, {seconds / 3600:.2f} h")
    return 0


def main(argv: list[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
