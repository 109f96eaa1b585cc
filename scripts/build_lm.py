"""Builds a word n-gram language model from text, without the sentences of the test sets.

    python scripts/build_lm.py --text train-clean-100.json --output_path english.lm \
        --exclude test-clean.json test-other.json

The ending of the output chooses its form: .lm is compiled, a seventh of the size of .arpa, which
any tool can read, and loads at once. `--arpa` compiles a model that there is.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asr.corpus.ngram import estimate, write_arpa
from asr.corpus.ngram_pruning import prune_by_entropy
from asr.corpus.transcripts import iterate_lines, read_lines, words_of
from asr.runtime.arpa import NgramModel, read_arpa
from asr.runtime.cli import Parser, guarded, int_list
from asr.runtime.files import check_writable, whole_file
from asr.runtime.ngrams import compile_model


class Text:
    """Sentences of texts, lists of words, without those of others; counts what it hands out."""

    def __init__(self, paths: Sequence[str], exclude: Sequence[str]) -> None:
        self.paths = paths
        self.closed = {
            tuple(words_of(line.text)): path for path in exclude for line in read_lines(path)
        }
        self.left_out = dict.fromkeys(exclude, 0)
        self.read = self.kept = self.words = 0

    def __iter__(self) -> Iterator[list[str]]:
        for line in (line for path in self.paths for line in iterate_lines(path)):
            words = words_of(line.text)
            self.read += 1
            if where := self.closed.get(tuple(words)):
                self.left_out[where] += 1
                continue
            self.kept += 1
            self.words += len(words)
            yield words


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(
        __doc__,
        epilog="A text is a manifest, a LibriSpeech folder, a *.trans.txt file, or plain text with "
        "one sentence a line.",
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", metavar="PATH", help="texts to count")
    source.add_argument("--arpa", metavar="FILE", help="a model to compile instead")
    add("--exclude", nargs="+", default=[], metavar="PATH", help="texts whose sentences stay out")
    add("--output_path", required=True, help="file to write: .lm (compiled) or .arpa (text)")
    add("--order", type=int, default=4, help="words in the longest n-gram (default: 4)")
    add(
        "--prune", type=int_list, default=(0, 0, 1), metavar="N,N,…",
        help="leave out n-grams seen at most so often, by order (default: 0,0,1)",
    )  # fmt: skip
    add(
        "--max_ngrams", type=int, default=0, metavar="N",
        help="then prune by relative entropy, down to so many n-grams (default: do not)",
    )  # fmt: skip
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Reads, counts, writes, and prints what was left out and what became of the rest."""
    output = Path(args.output_path)
    if output.suffix not in (".arpa", ".lm"):
        raise ValueError(f"{output}: the name of the model must end in .lm or .arpa")
    check_writable(output)
    started = time.perf_counter()
    model = read_arpa(args.arpa) if args.arpa else count(args)
    if output.suffix == ".lm":
        with whole_file(output, binary=True) as file:
            file.write(compile_model(model))
    else:
        write_arpa(output, model)
    sizes = ", ".join(f"{len(words)} {n}-grams" for n, (words, _, _) in enumerate(model.orders, 1))
    print(f"{output}: {sizes}; {output.stat().st_size / 1e6:.1f} MB")
    print(f"{time.perf_counter() - started:.1f} s")
    return 0


def count(args: argparse.Namespace) -> NgramModel:
    """The model of the texts; prints how much of them it has counted."""
    text = Text(args.text, args.exclude)
    model = estimate(text, args.order, args.prune, continuation=not args.max_ngrams)
    if args.max_ngrams:
        model = prune_by_entropy(model, args.max_ngrams)
    for path, number in text.left_out.items():
        print(f"left out {number} sentences of {path}")
    print(f"{text.kept} of {text.read} sentences, {text.words} words")
    return model


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
