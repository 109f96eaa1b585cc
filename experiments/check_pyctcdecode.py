"""Decodes a model's outputs with pyctcdecode as well, and compares its texts with ours.

pyctcdecode needs NumPy below 2, so give it an environment of its own:

    python3 -m venv v && v/bin/pip install "numpy<2" pyctcdecode kenlm jiwer tqdm .
    v/bin/python experiments/check_pyctcdecode.py --model_path M.onnx --lm lm.arpa --dev_data DIR

Both searches get the same outputs, language model, weights and beam. They differ by design in what
an unknown word costs (pyctcdecode: once for the word, ours: for every letter), in the sum over a
text's alignments, and in what they prune. The exit code is 1 if our WER is over a point higher.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from asr.common.metrics import error_rates
from asr.common.provenance import command_line, portable_path
from asr.measure.evaluation import read_test_data
from asr.measure.machine import provenance
from asr.runtime.audio import read_audio
from asr.runtime.beam import BeamConfig
from asr.runtime.cli import Parser, guarded, number
from asr.runtime.files import check_writable, write_json
from asr.runtime.recognizer import load
from asr.runtime.tokenizer import SPACE

MAX_BEHIND = 0.01  # of our WER behind pyctcdecode's
UNKNOWN = -10.0  # what an unknown word costs there, its default


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_path", required=True, help="an .onnx export of a character model")
    add("--lm", required=True, metavar="FILE", help="word n-gram model, .arpa")
    add("--dev_data", required=True, metavar="PATH", help="manifest or LibriSpeech folder")
    add("--lm_weight", type=number, default=BeamConfig.lm_weight, help="alpha there")
    add("--word_bonus", type=number, default=BeamConfig.word_bonus, help="beta there")
    add("--beam_size", type=int, default=BeamConfig.beam_size, help="hypotheses kept in a frame")
    add("--limit", type=int, default=0, help="only the first so many utterances (default: all)")
    parser.add_output_path("JSON with the rates")
    args = parser.parse_args(argv)
    args.command = command_line("experiments/check_pyctcdecode.py", argv)
    return args


def run(args: argparse.Namespace) -> int:
    """Compares, prints, writes; 1 if ours is behind."""
    try:
        from pyctcdecode import build_ctcdecoder
    except ImportError:
        raise ValueError("pyctcdecode is not installed; the script's head says how") from None
    if args.output_path:
        check_writable(args.output_path)
    config = BeamConfig(
        beam_size=args.beam_size, lm=args.lm, lm_weight=args.lm_weight, word_bonus=args.word_bonus
    )
    model = load(args.model_path, threads=1, beam=config)
    letters = [" " if token == SPACE else token for token in model.info.tokens[1:]]
    theirs = build_ctcdecoder(
        ["", *letters], kenlm_model_path=args.lm, unk_score_offset=UNKNOWN,
        alpha=config.lm_weight, beta=config.word_bonus,
    )  # fmt: skip
    decoders: dict[str, Callable[..., str]] = {
        "ours": model.decode,
        "pyctcdecode": partial(theirs.decode, beam_width=config.beam_size),
    }
    utterances = read_test_data(args.dev_data)[: args.limit or None]
    texts: dict[str, list[str]] = {name: [] for name in decoders}
    seconds = dict.fromkeys(decoders, 0.0)
    for utterance in tqdm(utterances, desc="decoding", unit="utt", leave=False, disable=None):
        waveform = read_audio(utterance.audio_filepath, model.info.features.sample_rate)
        log_probs = model.waveform_log_probs(waveform)  # (T', V)
        for name, decode in decoders.items():
            start = time.perf_counter()
            texts[name].append(" ".join(decode(log_probs).split()))
            seconds[name] += time.perf_counter() - start
    references = [u.text for u in utterances]
    rates = {name: error_rates(references, some) for name, some in texts.items()}
    pairs = list(zip(*texts.values(), strict=True))
    result: dict[str, Any] = {
        "wer": {name: rate["wer"] for name, rate in rates.items()},
        "cer": {name: rate["cer"] for name, rate in rates.items()},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "identical": sum(a == b for a, b in pairs) / len(pairs),
    }
    for name in texts:
        print(
            f"{name}: WER {result['wer'][name]:.2%}, CER {result['cer'][name]:.2%}, "
            f"{seconds[name]:.0f} s"
        )
    print(f"{result['identical']:.1%} of {len(utterances)} texts are identical")
    if args.output_path:
        about = {
            "model": portable_path(args.model_path), "lm": portable_path(args.lm),
            "dev_data": portable_path(args.dev_data), "utterances": len(utterances),
            "lm_weight": config.lm_weight, "word_bonus": config.word_bonus,
            "beam_size": config.beam_size, "pyctcdecode": version("pyctcdecode"),
        }  # fmt: skip
        write_json(args.output_path, about | provenance(args.command) | result)
    return int(result["wer"]["ours"] > result["wer"]["pyctcdecode"] + MAX_BEHIND)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
