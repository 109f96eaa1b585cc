"""Word n-gram models as text: the ARPA format, as SRILM, kenlm and `build_lm.py` write it."""

from __future__ import annotations

import gzip
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
NO_UNKNOWN = -100.0  # log10 P of unknown words where a model gives none, as kenlm's
LINES = 1 << 16  # read at a time

Ints = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


@dataclass
class NgramModel:
    """What an ARPA file holds: for each order words (N, n), log10 probabilities and back-offs.

    The words are indices of `vocabulary`, each of which is a 1-gram.
    """

    vocabulary: list[str]
    orders: list[tuple[Ints, Floats, Floats]]


def read_arpa(path: str | Path) -> NgramModel:
    """Reads an ARPA file, packed by gzip or not; ValueError, in one line, for anything else."""
    with open(path, "rb") as file:
        opener: Any = gzip.open if file.read(2) == b"\x1f\x8b" else open
    try:
        with opener(path, "rb") as lines:
            return _read(iter(lines))
    except (EOFError, ValueError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a usable ARPA language model: {error}") from None


def _read(lines: Iterator[bytes]) -> NgramModel:
    counts = _read_counts(lines)
    ids: dict[bytes, int] = {}
    orders = []
    for n, count in enumerate(counts, 1):
        _expect(lines, b"\\%d-grams:" % n)
        orders.append(_read_order(lines, n, count, ids))
    _expect(lines, b"\\end\\")
    try:
        vocabulary = [word.decode("utf-8") for word in ids]
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text; convert it, for example with iconv") from None
    for word in (BEGIN, END):
        if word not in vocabulary:
            raise ValueError(f"{word} is missing among the 1-grams")
    if UNKNOWN not in vocabulary:
        words, log, backoff = orders[0]
        words = np.append(words, [[len(vocabulary)]], axis=0)
        orders[0] = words, np.append(log, NO_UNKNOWN), np.append(backoff, 0.0)
        vocabulary.append(UNKNOWN)
    return NgramModel(vocabulary, orders)


def _expect(lines: Iterator[bytes], wanted: bytes) -> None:
    found = next((line.strip() for line in lines if line.strip()), b"its end")
    if found != wanted:
        raise ValueError(f"expected {_show(wanted)} and found {_show(found)}")


def _show(line: bytes) -> str:
    return ascii(line[:40].decode("utf-8", "replace"))[1:-1].replace("\\\\", "\\")


def _read_counts(lines: Iterator[bytes]) -> list[int]:
    r"""The numbers of n-grams of each order that \data\ promises."""
    _expect(lines, b"\\data\\")
    counts: list[int] = []
    for line in itertools.takewhile(bytes.strip, lines):
        found = re.fullmatch(rb"ngram\s+(\d+)\s*=\s*(\d+)", line.strip())
        if found is None or int(found[1]) != len(counts) + 1:
            raise ValueError(f"expected ngram {len(counts) + 1}=… and found {_show(line)}")
        counts.append(int(found[2]))
    if not counts or not counts[0]:
        raise ValueError("it lists no words")
    return counts


def _read_order(
    lines: Iterator[bytes], n: int, count: int, ids: dict[bytes, int]
) -> tuple[Ints, Floats, Floats]:
    """The n-grams of one order; 1-grams become `ids`."""
    parts = []
    for at in range(0, count, LINES):
        some = list(itertools.islice(lines, min(LINES, count - at)))
        fields = _fields(some, n)
        if fields is None or len(some) < min(LINES, count - at):
            bad = next(
                (line for line in some if len(line.split()) not in (n + 1, n + 2)), b"the end"
            )
            raise ValueError(f"expected {count} {n}-grams and found {_show(bad.strip())}")
        step = len(fields) // len(some)
        if n == 1:
            for word in fields[1::step]:
                ids.setdefault(b"<unk>" if word == b"<UNK>" else word, len(ids))
            if len(ids) != at + len(some):
                raise ValueError("a word stands twice among the 1-grams")
        words = np.empty((len(some), n), np.int32)
        try:
            for k in range(n):
                words[:, k] = [ids[word] for word in fields[k + 1 :: step]]
        except KeyError as error:
            raise ValueError(f"{_show(error.args[0])} is not among the 1-grams") from None
        log = np.array([float(field) for field in fields[::step]])
        backoff = np.zeros(len(log))
        if step == n + 2:
            backoff[:] = [float(field) for field in fields[n + 1 :: step]]
        if not (log <= 0).all() or not np.isfinite(log).all() or not np.isfinite(backoff).all():
            raise ValueError(f"a log probability of the {n}-grams is none")
        parts.append((words, log, backoff))
    if not parts:
        return np.zeros((0, n), np.int32), np.zeros(0), np.zeros(0)
    words, log, backoff = (np.concatenate(column) for column in zip(*parts, strict=True))
    return words, log, backoff


def _fields(lines: list[bytes], n: int) -> list[bytes] | None:
    """What stands in the lines of n-grams, of each n + 1 or else n + 2; None if that cannot be."""
    rows = [line.split() for line in lines]
    lengths = set(map(len, rows))
    if not lengths <= {n + 1, n + 2}:
        return None
    if len(lengths) == 2:  # not every n-gram has a back-off
        rows = [row if len(row) == n + 2 else [*row, b"0"] for row in rows]
    return list(itertools.chain.from_iterable(rows))
