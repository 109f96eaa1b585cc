"""Choose the weights of a language model on development data, never on a test set.

python scripts/tune_lm.py --model_path model.pt --lm lm.arpa --dev_data LibriSpeech/dev-clean
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from asr.audio import read_audio
from asr.beam import BeamConfig
from asr.cli import guarded, number
from asr.evaluation import check_writable, write_json
from asr.language_model import load_decoder
from asr.machine import command_line, commit, portable_path
from asr.manifest import find_sources, load_dataset
from asr.metrics import error_rates
from asr.recognizer import load


def number_list(text: str) -> tuple[float, ...]:
    """Parses '0.3,0.5' into (0.3, 0.5)."""
    return tuple(number(part) for part in text.split(",") if part.strip())


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = argparse.ArgumentParser(
        description="Tries weights of a language model on development data.",
        epilog="The network runs once; every pair of weights is a beam search over its output.",
    )
    add = parser.add_argument
    add("--model_path", required=True, help="a .pt checkpoint or an .onnx export")
    add("--lm", required=True, metavar="FILE", help="word n-gram model, .arpa or kenlm's")
    add("--dev_data", required=True, metavar="PATH", help="manifest or LibriSpeech folder")
    add("--lm_weights", type=number_list, default=(0.3, 0.5, 0.7), help="default: 0.3,0.5,0.7")
    add("--word_bonuses", type=number_list, default=(0.0, 1.0, 2.0), help="default: 0,1,2")
    add("--unknown_penalty", type=number, default=BeamConfig.unknown_penalty, help="as transcribe")
    add("--beam_size", type=int, default=BeamConfig.beam_size, help="hypotheses kept in a frame")
    add("--limit", type=int, default=0, help="only the first so many utterances (default: all)")
    add("--threads", type=int, default=0, help="processor threads (default: all cores)")
    add("--output_file", help="JSON with the table")
    args = parser.parse_args(argv)
    args.command = command_line("scripts/tune_lm.py", argv)
    return args


def run(args: argparse.Namespace) -> int:
    """Prints the word error rate of each pair, and the flags of the best."""
    tests = [name for name in find_sources(args.dev_data) if name.lower().startswith("test")]
    if tests:
        raise ValueError(f"{args.dev_data}: {', '.join(tests)} is a test set; name a dev set")
    configs = [
        BeamConfig(
            beam_size=args.beam_size,
            lm=args.lm,
            lm_weight=weight,
            word_bonus=bonus,
            unknown_penalty=args.unknown_penalty,
        )
        for weight, bonus in itertools.product(args.lm_weights, args.word_bonuses)
    ]
    if args.output_file:
        check_writable(args.output_file)
    if not configs:
        raise ValueError("no weights to try; give --lm_weights and --word_bonuses")
    recognizer = load(args.model_path, args.threads, configs[0])
    utterances = load_dataset(args.dev_data)[: args.limit or None]
    rate = recognizer.info.features.sample_rate
    log_probs = [
        recognizer.waveform_log_probs(read_audio(u.audio_filepath, rate))
        for u in tqdm(utterances, desc="network", unit="utt", leave=False, disable=None)
    ]
    rows: list[dict[str, Any]] = []
    for config in configs:
        recognizer.decoder = load_decoder(recognizer.info.tokens, config)
        texts = [recognizer.decode(x) for x in tqdm(log_probs, leave=False, disable=None)]
        rates = error_rates([u.text for u in utterances], texts)
        rows.append({"lm_weight": config.lm_weight, "word_bonus": config.word_bonus, **rates})
        print(
            f"--lm_weight {config.lm_weight:g} --word_bonus {config.word_bonus:g}: "
            f"WER {rates['wer']:.2%}, CER {rates['cer']:.2%}",
            flush=True,
        )
    best = min(rows, key=lambda row: (row["wer"], row["cer"]))
    print(f"best: --lm_weight {best['lm_weight']:g} --word_bonus {best['word_bonus']:g}")
    if args.output_file:
        about = {
            "model": portable_path(args.model_path),
            "lm": portable_path(args.lm),
            "dev_data": portable_path(args.dev_data),
            "utterances": len(utterances),
            "beam_size": args.beam_size,
            "unknown_penalty": args.unknown_penalty,
            "command": args.command,
            "commit": commit(),
        }
        write_json(args.output_file, about | {"table": rows})
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parse_args(argv)
    return guarded(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
