"""Writes texts for recordings that have none, by a model: more speech to train on.

    python scripts/label_speech.py --model_path model_int8.onnx --lm english.lm \
        --data_dir unlabelled.json --output_path data/train-heard.json

What the model is less sure of is left out: its mistakes would be learnt. --test_data says what a
confidence is worth, on recordings with texts: the share kept, and the WER of what is kept.
--agree_with asks a second opinion instead, such as label_by_phonemes.py writes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from asr.common.metrics import word_counts
from asr.corpus.manifest import Utterance, read_manifest, write_manifest
from asr.corpus.splits import load_dataset
from asr.measure.evaluation import read_test_data
from asr.runtime.cli import Parser, describe, guarded, number
from asr.runtime.files import check_writable
from asr.runtime.language_model import add_beam_flags, beam_from_flags
from asr.runtime.recognizer import Recognizer, load

SURE, SURE_WITH_LM = 0.8, 0.95  # alike in what they keep: a language model makes texts surer
STEPS = (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)  # confidences of the printed table


def heard(
    recognizer: Recognizer, utterances: Sequence[Utterance]
) -> Iterator[tuple[Utterance, str, float]]:
    """Each utterance that can be read, its text and how sure the model is of it."""
    for utterance in tqdm(utterances, unit="utt", leave=False, disable=None):
        try:
            result = recognizer.transcribe(utterance.audio_filepath)
        except (ValueError, OSError) as error:
            print(f"left out: {describe(error)}", file=sys.stderr)
            continue
        yield utterance, result.text, result.confidence


def show_worth(recognizer: Recognizer, utterances: Sequence[Utterance]) -> None:
    """Prints, for each of STEPS, the share of speech that is so sure and its WER."""
    found = list(heard(recognizer, utterances))
    sure = np.array([confidence for _, _, confidence in found])
    counts = np.array([word_counts(u.text, text) for u, text, _ in found])
    durations = np.array([u.duration for u, _, _ in found])
    print("confidence  speech kept  WER of it")
    for step in STEPS:
        kept = sure >= step
        words = counts[kept, 3].sum()
        if words:
            part, errors = durations[kept].sum() / durations.sum(), counts[kept, :3].sum()
            print(f"{step:10.2f}  {part:11.1%}  {errors / words:9.1%}", flush=True)


def run(args: argparse.Namespace) -> int:
    check_writable(args.output_path)
    utterances = [u for path in args.data_dir for u in unlabelled(path)]
    recognizer = load(args.model_path, args.threads, beam_from_flags(args), min_confidence=0)
    if args.min_confidence is None:
        args.min_confidence = SURE_WITH_LM if recognizer.worded else SURE
    if args.test_data:
        show_worth(recognizer, read_test_data(args.test_data, args.limit))
    found = heard(recognizer, utterances[: args.limit or None])
    kept = list(agreed(found, args) if args.agree_with else sure(found, args.min_confidence))
    if not kept:
        asked = f"a confidence of {args.min_confidence} or more"
        if args.agree_with:
            asked = f"at most {args.max_difference} of the words other than in {args.agree_with}"
        raise ValueError(f"none of the recordings is heard with {asked}")
    write_manifest(args.output_path, kept)
    hours = sum(u.duration for u in kept) / 3600
    print(f"{len(kept)} of {len(utterances)} recordings, {hours:.2f} h: {args.output_path}")
    return 0


Heard = Iterator[tuple[Utterance, str, float]]


def sure(found: Heard, least: float) -> Iterator[Utterance]:
    """Those with a text of at least this confidence."""
    for utterance, text, confidence in found:
        if text and confidence >= least:
            yield replace(utterance, text=text)


def agreed(found: Heard, args: argparse.Namespace) -> Iterator[Utterance]:
    """Those of which the second opinion differs in few words; its text is the one that is kept.

    Two recognisers seldom make the same mistake, and a model learns more from the other's texts
    than from its own.
    """
    other = {u.audio_filepath: u.text for u in read_manifest(args.agree_with)}
    for utterance, text, _ in found:
        opinion = other.get(utterance.audio_filepath, "")
        if text and opinion:
            errors, words = sum(word_counts(opinion, text)[:3]), len(opinion.split())
            if errors <= args.max_difference * words:
                yield replace(utterance, text=opinion)


def unlabelled(path: str) -> list[Utterance]:
    """The utterances of a manifest, or of a folder's train part; their texts are not read."""
    return read_manifest(path) if Path(path).is_file() else load_dataset(path, "train")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_path", help="a .pt or .onnx model (default: the English one that ships)")
    add("--data_dir", required=True, nargs="+", help="manifests of recordings; texts may be empty")
    add("--output_path", required=True, help="manifest to write: name it train-SOMETHING.json")
    add("--min_confidence", type=number,
        help="mean confidence of the words of a recording that is kept "
        f"({SURE}, with a language model {SURE_WITH_LM})")  # fmt: skip
    add("--agree_with", help="manifest of the same recordings with texts of another recogniser: "
        "those that differ little are kept, in place of the sure ones")  # fmt: skip
    add("--max_difference", type=number, default=0.5,
        help="share of the words that may differ (%(default)s)")  # fmt: skip
    add("--test_data", help="recordings with texts, to see what a confidence is worth")
    add("--limit", type=int, default=0, help="only the first so many recordings (default: all)")
    add("--threads", type=int, default=1, help="processor threads (%(default)s)")
    add_beam_flags(parser)
    args = parser.parse_args(argv)
    if args.min_confidence is not None and not 0 <= args.min_confidence <= 1:
        parser.error(f"--min_confidence {args.min_confidence} must lie in [0, 1]")
    if args.agree_with and args.min_confidence is not None:
        parser.error("give --min_confidence or --agree_with")
    if min(args.limit, args.threads) < 0:
        parser.error("--limit and --threads must be at least 0")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
