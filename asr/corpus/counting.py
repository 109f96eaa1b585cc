"""Counts the n-grams of a text of any length: sorted runs on disk, merged in ranges.

Words are numbers of 32 bits; an n-gram is the number of the (n - 1)-gram that it begins with and
its last word, 64 bits together. A piece of the text is sorted and counted in memory and written as
a run; runs are merged a range of n-grams at a time. 94 million words need 4 GB of memory.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from asr.runtime.arpa import BEGIN, END, UNKNOWN

PIECE = 1 << 23  # places of the text sorted at once

Ints = npt.NDArray[np.int32]
Codes = npt.NDArray[np.int64]


@dataclass
class Level:
    """The n-grams of one order, sorted; arrays (N,), the indices are those of the order below."""

    prefix: Ints  # the n-gram without its last word
    suffix: Ints  # the n-gram without its first word
    word: Ints  # the last word
    count: Ints  # in the text
    begins: npt.NDArray[np.bool_]  # with <s>


def number_words(sentences: Iterable[Sequence[str]]) -> tuple[list[str], Ints]:
    """The sorted vocabulary, and the text as its numbers (L,), <s> and </s> around each sentence.

    Raises ValueError for a text without words and for one that holds those signs.
    """
    ids = {UNKNOWN: 0, BEGIN: 1, END: 2}
    text = array("i")
    for sentence in sentences:
        if sentence:
            text.append(1)
            text.extend([ids.setdefault(word, len(ids)) for word in sentence])
            text.append(2)
    if not text:
        raise ValueError("no words in the text")
    found = list(ids)
    order = [0, 1, 2, *sorted(range(3, len(found)), key=found.__getitem__)]
    place = np.empty(len(found), np.int32)
    place[order] = np.arange(len(found), dtype=np.int32)
    words = np.frombuffer(text, np.int32)
    for at in range(0, len(words), PIECE):
        words[at : at + PIECE] = place[words[at : at + PIECE]]
    if not alternate(words):
        raise ValueError(f"{UNKNOWN}, {BEGIN} and {END} are not words; remove them from the text")
    return [found[i] for i in order], words


def alternate(words: Ints) -> bool:
    """Whether <s> and </s> take turns, and <unk> is nowhere."""
    signs = words[words < 3]
    return bool((signs[::2] == 1).all() and (signs[1::2] == 2).all() and (signs > 0).all())


def count(words: Ints, n_words: int, order: int, piece: int = PIECE) -> list[Level]:
    """The n-grams of each order; the first level holds every word of the vocabulary."""
    everything = np.arange(n_words, dtype=np.int32)
    unigrams = np.bincount(words, minlength=n_words).astype(np.int32)
    levels = [Level(everything * 0, everything * 0, everything, unigrams, everything == 1)]
    index = words.copy()  # of the n-gram that begins at each place; -1 where none does
    for n in range(2, order + 1):
        with tempfile.TemporaryDirectory() as folder:
            runs = []
            for start, codes, places in pieces(words, index, n_words, n, piece):
                path = Path(folder) / f"{start}"
                write_run(path, codes, places)
                runs.append(path)
            codes, counts, places = merge(runs, piece)
        levels.append(
            Level(
                (codes // n_words).astype(np.int32), index[places + 1],
                (codes % n_words).astype(np.int32), counts, words[places] == 1,
            )
        )  # fmt: skip
        if n < order:
            longer = np.full(len(words), -1, np.int32)
            for _, own, places in pieces(words, index, n_words, n, piece):
                longer[places] = np.searchsorted(codes, own)
            index = longer
    return levels


def pieces(
    words: Ints, index: Ints, n_words: int, n: int, piece: int
) -> Iterator[tuple[int, Codes, Codes]]:
    """The n-grams of the text in pieces: where it begins, their codes, and their places."""
    for start in range(0, len(words), piece):
        places = np.arange(start, min(start + piece, len(words) - n + 1))
        places = places[(index[places] >= 0) & (words[places + n - 2] != 2)]
        yield start, index[places].astype(np.int64) * n_words + words[places + n - 1], places


def write_run(path: Path, codes: Codes, places: Codes) -> None:
    """The codes of a piece, sorted, each once, with its count and its first place."""
    codes, first, counts = np.unique(codes, return_index=True, return_counts=True)
    for name, values in (("codes", codes), ("counts", counts), ("places", places[first])):
        np.save(f"{path}.{name}.npy", values)


def merge(runs: Sequence[Path], piece: int) -> tuple[Codes, Ints, Codes]:
    """Codes (N,) of all runs, sorted, with their counts and first places."""
    opened = [
        [np.load(f"{run}.{name}.npy", mmap_mode="r") for name in ("codes", "counts", "places")]
        for run in runs
    ]
    total = sum(len(codes) for codes, _, _ in opened)
    samples = np.sort(np.concatenate([codes[:: max(1, piece // 64)] for codes, _, _ in opened]))
    n_ranges = -(-total // piece)
    borders = np.unique(samples[np.arange(1, n_ranges) * len(samples) // n_ranges])
    done: list[tuple[Codes, Ints, Codes]] = []
    cuts = [[0, *np.searchsorted(codes, borders).tolist(), len(codes)] for codes, _, _ in opened]
    for number in range(len(borders) + 1):
        slices = [
            [values[cut[number] : cut[number + 1]] for values in run]
            for run, cut in zip(opened, cuts, strict=True)
        ]
        parts = [np.concatenate(column) for column in zip(*slices, strict=True)]
        order = np.argsort(parts[0], kind="stable")  # runs are in the order of the text
        codes, counts, places = (part[order] for part in parts)
        starts = np.flatnonzero(np.diff(codes, prepend=-1))
        if len(starts):
            sums = np.add.reduceat(counts, starts).astype(np.int32)
            done.append((codes[starts], sums, places[starts]))
    if not done:
        empty = np.zeros(0, np.int64)
        return empty, empty.astype(np.int32), empty
    codes, counts, places = (np.concatenate(column) for column in zip(*done, strict=True))
    return codes, counts, places
