"""Checks speech data and writes manifests for train.py and evaluate.py.

    python scripts/prepare_data.py --data_dir ./LibriSpeech/train-clean-100
    python scripts/prepare_data.py --download dev-clean

In go LibriSpeech folders, manifests, Common Voice's folders, CSV or TSV tables, folders of audio
with a text file beside each recording, and Kaldi's data folders.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from asr.corpus.download import MD5, URL, download_split
from asr.corpus.prepare import Rules, name_sources, prepare, summary, write_prepared
from asr.network.checkpoint import load_checkpoint
from asr.runtime.cli import Parser, guarded, number
from asr.runtime.tokenizer import ENGLISH


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--data_dir",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="corpus, split folder, manifest or table; may be repeated",
    )
    add("--output_dir", default="./data/LibriSpeech", help="where manifests go (%(default)s)")
    add(
        "--download",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help=f"fetch and prepare LibriSpeech splits: {', '.join(MD5)}",
    )
    add("--download_dir", default="./data", help="archives and audio go here (%(default)s)")
    add("--download_url", default=URL, help="a mirror of the archives (%(default)s)")
    add("--keep_archive", action="store_true", help="keep the .tar.gz after unpacking")
    add(
        "--model_path",
        help="the model to be trained further: its letters, capitals and frames are the rules",
    )
    add("--alphabet", default=ENGLISH, help="letters besides the space (%(default)s)")
    add("--min_duration", type=number, default=0.1, help="seconds (%(default)s)")
    add("--max_duration", type=number, default=35.0, help="seconds (%(default)s)")
    add("--subsampling_factor", type=int, default=4, help="of the model (%(default)s)")
    add(
        "--normalize_text",
        default="",
        metavar="LANGUAGE",
        help="en: write numbers, abbreviations and signs as words (default: leave such out)",
    )
    add("--decode", action="store_true", help="decode all audio to find damage (slower)")
    add("--to_wav", action="store_true", help="copy as 16 kHz 16-bit WAV to OUTPUT_DIR/wav")
    add("--num_workers", type=int, default=4, help="threads (%(default)s)")
    return parser.parse_args(argv)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if not args.data_dir and not args.download:
        raise ValueError("nothing to prepare; give --data_dir PATH or --download NAME")
    if args.num_workers < 1:
        raise ValueError(f"--num_workers {args.num_workers} must be at least 1")
    tokenizer, factor = None, args.subsampling_factor
    if args.model_path:
        if (args.alphabet, factor) != (ENGLISH, 4):
            raise ValueError("--alphabet and --subsampling_factor are those of --model_path")
        checkpoint = load_checkpoint(args.model_path)
        tokenizer, factor = checkpoint.tokenizer, checkpoint.model.config.total_factor
    rules = Rules(args.alphabet, args.min_duration, args.max_duration, factor,
                  args.normalize_text, args.decode, tokenizer)  # fmt: skip
    output_dir = Path(args.output_dir)
    sources = name_sources(args.data_dir + [download(name, args) for name in args.download])
    for name, path in sources.items():
        if path.resolve() == (output_dir / f"{name}.json").resolve():
            raise ValueError(f"{path}: would be overwritten; choose another --output_dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    done = []
    for name, path in sources.items():

        def track(results: Iterable[Any], count: int, name: str = name) -> Any:
            return tqdm(results, desc=name, total=count, unit="utt", disable=None)

        wav_dir = output_dir / "wav" / name if args.to_wav else None
        done.append(prepare(name, path, rules, wav_dir, args.num_workers, track))
    for prepared in done:
        manifest = write_prepared(prepared, output_dir)
        print(summary(prepared))
        if prepared.left_out:
            print(f"    all in {manifest.with_suffix('.left_out.tsv')}")
        print(f"  wrote {manifest}", flush=True)
    return 0


def download(name: str, args: argparse.Namespace) -> Path:
    """Fetch a split with a progress bar in bytes."""
    with tqdm(desc=name, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:

        def show(there: int, total: int) -> None:
            bar.total = total or None
            bar.update(there - bar.n)

        return download_split(name, args.download_dir, args.download_url, show, args.keep_archive)


def main(argv: list[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
