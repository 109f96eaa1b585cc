"""Chooses the weights of a language model on development data, never on a test set.

    python scripts/tune_lm.py --model_path model.pt --lm lm.arpa --dev_data dev-clean.json

The network runs once; every pair of weights is a beam search over its output. Every pair of a
coarse grid is tried, then those halfway from the best pair to its neighbours. A best value at an
edge of the grid is pointed out, since a better one may lie beyond.
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

from asr.common.metrics import error_rates
from asr.common.provenance import command_line, portable_path
from asr.corpus.manifest import Utterance
from asr.corpus.splits import find_sources, load_dataset
from asr.measure.machine import default_threads, provenance
from asr.runtime.audio import read_audio
from asr.runtime.beam import BeamConfig
from asr.runtime.cli import Parser, guarded, number
from asr.runtime.decoding import greedy_decode
from asr.runtime.files import check_writable, write_json
from asr.runtime.language_model import load_decoder
from asr.runtime.recognizer import load

GRIDS = {"lm_weight": "lm_weights", "word_bonus": "word_bonuses"}  # what is tuned, and its flag


def number_list(text: str) -> tuple[float, ...]:
    """Parses '0.3,0.5' into (0.3, 0.5)."""
    return tuple(number(part) for part in text.split(",") if part.strip())


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_path", required=True, help="a .pt checkpoint or an .onnx export")
    add("--lm", required=True, metavar="FILE", help="word n-gram model, .lm or .arpa")
    add(
        "--dev_data",
        required=True,
        nargs="+",
        metavar="PATH",
        help="manifests or LibriSpeech folders; of several, the mean of their rates counts",
    )
    add("--lm_weights", type=number_list, default=(0.3, 0.7, 1.1), help="default: 0.3,0.7,1.1")
    add("--word_bonuses", type=number_list, default=(0.0, 1.5, 3.0),
        help="default: 0,1.5,3; with a negative one first: --word_bonuses=-1,0,1")  # fmt: skip
    add("--unknown_penalty", type=number, default=BeamConfig.unknown_penalty, help="as transcribe")
    add("--beam_size", type=int, default=BeamConfig.beam_size, help="hypotheses kept in a frame")
    add("--limit", type=int, default=0, help="so many utterances, evenly spread (default: all)")
    add("--threads", type=int, default=0,
        help="processor threads (default: the idle cores but one, at least 1)")  # fmt: skip
    parser.add_output_path("JSON with the table")
    args = parser.parse_args(argv)
    for name in ("limit", "threads"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} {getattr(args, name)} must be at least 0")
    args.command = command_line("scripts/tune_lm.py", argv)
    return args


def configure(args: argparse.Namespace, weight: float, bonus: float) -> BeamConfig:
    """The search with a pair of weights."""
    return BeamConfig(
        beam_size=args.beam_size,
        lm=args.lm,
        lm_weight=weight,
        word_bonus=bonus,
        unknown_penalty=args.unknown_penalty,
    )


def flags_of(row: dict[str, Any]) -> str:
    """The flags that choose the weights of a row."""
    return " ".join(f"--{name} {row[name]:g}" for name in GRIDS)


def rank(row: dict[str, Any]) -> tuple[float, float]:
    """What the best row has least of."""
    return row["wer"], row["cer"]


def every_nth(utterances: Sequence[Utterance], limit: int) -> list[Utterance]:
    """`limit` of the utterances at equal steps through their sorted ids, so of many speakers."""
    count = len(utterances)
    if not 0 < limit < count:
        return list(utterances)
    ordered = sorted(utterances, key=lambda u: u.id)
    return [ordered[i * count // limit] for i in range(limit)]


def halfway(values: Sequence[float], best: float) -> list[float]:
    """The best of the values and those halfway to its neighbours."""
    grid = sorted(set(values))
    at = grid.index(best)
    neighbours = grid[max(at - 1, 0) : at] + grid[at + 1 : at + 2]
    return sorted([best, *(round((best + value) / 2, 6) for value in neighbours)])


def edge_notes(best: dict[str, Any], grids: dict[str, Sequence[float]]) -> list[str]:
    """A line for every flag whose best value is the smallest or largest of several tried."""
    notes = []
    for name, values in grids.items():
        low, high = min(values), max(values)
        if low == high or (name == "lm_weight" and best[name] == 0):  # no weight is negative
            continue
        for edge, which, way in ((low, "smallest", "downwards"), (high, "largest", "upwards")):
            if best[name] == edge:
                notes.append(
                    f"note: the best {name}, {edge:g}, is the {which} tried and a better one may "
                    f"lie beyond; widen --{GRIDS[name]} {way}"
                )
    return notes


def run(args: argparse.Namespace) -> int:
    """Prints the word error rate of each pair, and the flags of the best."""
    for path in args.dev_data:
        tests = [name for name in find_sources(path) if name.lower().startswith("test")]
        if tests:
            raise ValueError(f"{path}: {', '.join(tests)} is a test set; name a dev set")
    grids = {name: getattr(args, flag) for name, flag in GRIDS.items()}
    configs = {pair: configure(args, *pair) for pair in itertools.product(*grids.values())}
    if args.output_path:
        check_writable(args.output_path)
    if not configs:
        raise ValueError("no weights to try; give --lm_weights and --word_bonuses")
    threads = args.threads or default_threads()
    recognizer = load(args.model_path, threads, next(iter(configs.values())))
    sets = [every_nth(load_dataset(path), args.limit) for path in args.dev_data]
    utterances = [u for part in sets for u in part]
    rate = recognizer.info.features.sample_rate
    log_probs = [
        recognizer.waveform_log_probs(read_audio(u.audio_filepath, rate))
        for u in tqdm(utterances, desc="network", unit="utt", leave=False, disable=None)
    ]

    def measure(name: str) -> dict[str, Any]:
        """The error rates of the recognizer's present decoder, which are printed."""
        texts = iter([recognizer.decode(x) for x in tqdm(log_probs, leave=False, disable=None)])
        found = [error_rates([u.text for u in part], [next(texts) for _ in part]) for part in sets]
        rates = {key: sum(r[key] for r in found) / len(found) for key in ("wer", "cer")}
        parts = ", ".join(f"{r['wer']:.2%}" for r in found)
        several = f" (mean of {parts})" if len(found) > 1 else ""
        print(f"{name}: WER {rates['wer']:.2%}{several}, CER {rates['cer']:.2%}", flush=True)
        return rates | {"wers": [r["wer"] for r in found]}

    def search(pairs: dict[tuple[float, ...], BeamConfig]) -> list[dict[str, Any]]:
        """A row of the table for each pair of weights."""
        rows = []
        for pair, config in pairs.items():
            recognizer.decoder = load_decoder(recognizer.info.tokens, config)
            values = dict(zip(grids, pair, strict=True))
            rows.append(values | measure(flags_of(values)))
        return rows

    recognizer.decoder = greedy_decode
    greedy = measure("greedy")
    rows = search(configs)
    best = min(rows, key=rank)
    near = itertools.product(*(halfway(values, best[name]) for name, values in grids.items()))
    rows += search({pair: configure(args, *pair) for pair in near if pair not in configs})
    best = min(rows, key=rank)
    print(f"best: {flags_of(best)} (WER {best['wer']:.2%}, greedy {greedy['wer']:.2%})")
    for note in edge_notes(best, grids):
        print(note)
    if args.output_path:
        about = {
            "model": portable_path(args.model_path),
            "lm": portable_path(args.lm),
            "dev_data": [portable_path(path) for path in args.dev_data],
            "utterances": len(utterances),
            "beam_size": args.beam_size,
            "unknown_penalty": args.unknown_penalty,
            "greedy_wer": greedy["wer"],
            "best": {key: best[key] for key in (*GRIDS, "wer")},
        }
        write_json(args.output_path, about | provenance(args.command) | {"table": rows})
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
