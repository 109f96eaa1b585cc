"""Measures what hotwords do for rare words, and to the others.

    python experiments/measure_hotwords.py --model_path M.onnx --dev_data dev-clean \
        --text train-clean-100.trans.txt --output_path hotwords.json

Rare words, mostly names, are those of the references that the text has not once and that have at
least 4 letters; all of them are hotwords at once. Of rare words the errors are those not heard;
elsewhere they are all other substitutions, deletions and insertions, also of hotwords heard where
nobody said them, over the other words.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from asr.common.provenance import command_line, portable_path
from asr.corpus.splits import load_dataset
from asr.corpus.transcripts import read_lines, words_of
from asr.measure.machine import provenance
from asr.runtime.audio import read_audio
from asr.runtime.beam import BeamConfig
from asr.runtime.cli import Parser, guarded, number
from asr.runtime.decoding import greedy_decode
from asr.runtime.files import check_writable, write_json
from asr.runtime.language_model import load_decoder
from asr.runtime.recognizer import load

LETTERS = 4  # of a rare word at least


def number_list(text: str) -> tuple[float, ...]:
    """Parses '6,10' into (6, 10)."""
    return tuple(number(part) for part in text.split(",") if part.strip())


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_path", required=True, help="a .pt checkpoint or an .onnx export")
    add("--dev_data", required=True, metavar="PATH", help="manifest or LibriSpeech folder")
    add("--text", required=True, metavar="PATH", help="text whose words are not rare")
    add("--bonuses", type=number_list, default=(8.0, 10.0), help="default: 8,10")
    add("--lm", default="", metavar="FILE", help="word n-gram model as well")
    add("--lm_weight", type=number, default=BeamConfig.lm_weight, help="as transcribe")
    add("--word_bonus", type=number, default=BeamConfig.word_bonus, help="as transcribe")
    add("--every", type=int, default=1, metavar="N", help="only every Nth utterance")
    add("--first", type=int, default=0, metavar="N", help="from this one on: another part of them")
    parser.add_output_path("JSON with the table")
    args = parser.parse_args(argv)
    args.command = command_line("experiments/measure_hotwords.py", argv)
    return args


def count(references: Sequence[str], texts: Sequence[str], rare: set[str]) -> dict[str, Any]:
    """Errors of rare words and elsewhere."""
    import jiwer

    missed = others = 0
    for reference, text in zip(references, texts, strict=True):
        said = reference.split()
        for part in jiwer.process_words(reference, text).alignments[0]:
            if part.type == "equal":
                continue
            words = said[part.ref_start_idx : part.ref_end_idx]
            heard = sum(word in rare for word in words)
            missed += heard
            others += len(words) - heard if words else part.hyp_end_idx - part.hyp_start_idx
    words = [word for reference in references for word in reference.split()]
    total = sum(word in rare for word in words)
    return {
        "rare_words": total,
        "rare_errors": missed,
        "rare_error_rate": missed / max(total, 1),
        "other_words": len(words) - total,
        "other_errors": others,
        "other_error_rate": others / max(len(words) - total, 1),
    }


def run(args: argparse.Namespace) -> int:
    """Prints and writes a row for no hotwords, and for every bonus."""
    if args.output_path:
        check_writable(args.output_path)
    utterances = load_dataset(args.dev_data)[args.first :: args.every]
    references = [" ".join(words_of(u.text)) for u in utterances]
    common = {word for line in read_lines(args.text) for word in words_of(line.text)}
    found = {word for reference in references for word in reference.split()} - common
    rare = sorted(word for word in found if len(word) >= LETTERS)
    recognizer = load(args.model_path, 1)
    rate = recognizer.info.features.sample_rate
    log_probs = [
        recognizer.waveform_log_probs(read_audio(u.audio_filepath, rate))
        for u in tqdm(utterances, desc="network", unit="utt", leave=False, disable=None)
    ]
    weights = {"lm_weight": args.lm_weight, "word_bonus": args.word_bonus} if args.lm else {}
    searches: dict[str, BeamConfig | None] = {
        "no hotwords": BeamConfig(lm=args.lm, **weights) if args.lm else None
    }
    for bonus in args.bonuses:
        hotwords = ", ".join(f"{word}:{bonus:g}" for word in rare)
        searches[f"bonus {bonus:g}"] = BeamConfig(lm=args.lm, hotwords=hotwords, **weights)
    rows = []
    for name, config in searches.items():
        decode = load_decoder(recognizer.info.tokens, config) if config else greedy_decode
        texts = [recognizer.tokenizer.decode(decode(x)) for x in log_probs]
        rows.append({"search": name, **count(references, texts, set(rare))})
        print(
            f"{name}: rare words {rows[-1]['rare_error_rate']:.1%} of {rows[-1]['rare_words']} "
            f"wrong, elsewhere {rows[-1]['other_error_rate']:.2%}",
            flush=True,
        )
    if args.output_path:
        about = {
            "model": portable_path(args.model_path),
            "dev_data": portable_path(args.dev_data),
            "text": portable_path(args.text),
            "lm": portable_path(args.lm),
            "utterances": len(utterances),
            "hotwords": len(rare),
        }
        write_json(args.output_path, about | provenance(args.command) | {"table": rows})
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
