"""Counts what training and test data share: utterances, speakers and sentences.

    python experiments/check_overlap.py --train train-clean-100.json \
        --test test-clean.json test-other.json --output_path overlap.json

Speakers are counted where transcripts name them; where one side names none, what is shared is
unknown: null in the JSON, not 0. Speakers are told apart by their ids, and every corpus has ids of
its own: those of different corpora are not comparable. Manifests do not name their corpus, so equal
ids of two corpora are counted as well; the JSON gives examples to check.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asr.common.provenance import command_line, portable_path
from asr.corpus.transcripts import Line, overlap, read_lines
from asr.measure.machine import provenance
from asr.runtime.cli import Parser, guarded
from asr.runtime.files import check_writable, write_json


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(
        __doc__,
        epilog="Each path is a manifest, a LibriSpeech folder, a folder of these, a *.trans.txt "
        "file, or plain text with one sentence a line.",
    )
    add = parser.add_argument
    add("--train", nargs="+", required=True, metavar="PATH", help="what was learnt from, also text")
    add("--test", nargs="+", required=True, metavar="PATH", help="what is reported on")
    parser.add_output_path("JSON with the counts and examples")
    add("--no_texts", action="store_true", help="name sentences by their ids, for closed corpora")
    args = parser.parse_args(argv)
    args.command = command_line("experiments/check_overlap.py", argv)
    return args


def compare(train: Sequence[Line], test: Sequence[Line]) -> dict[str, Any]:
    """The counts of `asr.corpus.transcripts.overlap`; None for speakers that are not known."""
    row = overlap(train, test)
    if not row["speakers"]:
        row["speakers"] = row["shared_speakers"] = None
    if not any(line.speaker for line in train):
        row["shared_speakers"] = None
    return row


def speakers_of(row: dict[str, Any]) -> str:
    """The speakers of a comparison in words."""
    if row["shared_speakers"] is None:
        return "speakers unknown"
    return f"{row['shared_speakers']} of {row['speakers']} speakers"


def run(args: argparse.Namespace) -> int:
    """Compares every test set with every training set, and prints and writes the counts."""
    if args.output_path:
        check_writable(args.output_path)
    trains = {path: read_lines(path) for path in args.train}
    rows: list[dict[str, Any]] = []
    for test in args.test:
        lines = read_lines(test)
        for train, train_lines in trains.items():
            row = compare(train_lines, lines)
            if args.no_texts:
                named = row["examples"]["sentences"]
                row["examples"]["sentences"] = [text.partition(":")[0] for text in named]
            rows.append({"train": portable_path(train), "test": portable_path(test), **row})
            print(
                f"{test} in {train}: {row['shared_utterances']} of {row['utterances']} utterances, "
                f"{speakers_of(row)}, "
                f"{row['shared_sentences']} sentences, {row['shared_single_words']} single words"
            )
            for sentence in row["examples"]["sentences"]:
                print(f"    {sentence}")
    if args.output_path:
        write_json(args.output_path, provenance(args.command) | {"overlaps": rows})
        print(f"written to {args.output_path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
