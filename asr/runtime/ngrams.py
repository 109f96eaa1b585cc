"""Word n-gram models in a form that is small and ready to use: a trie in sorted arrays.

The words are numbered by the alphabet and the n-grams of each order by their words, so those that
begin with the same n - 1 words lie side by side with rising last words, and one is found by
halving. An n-gram with a back-off or with longer ones that begin with it is a context, and only
contexts have a back-off and a number of longer ones. Log probabilities and back-offs are numbers
of the entries of a codebook of 256 values, or else float32 and exact. A file is mapped, so that
only what is asked for is read.

A file is MAGIC, the length of its header (uint32), the header as JSON, and the arrays that it
names, at multiples of 8 bytes, little-endian.
"""

from __future__ import annotations

import json
import mmap
import zlib
from bisect import bisect_left
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asr.runtime.arpa import BEGIN, END, UNKNOWN, NgramModel

MAGIC = b"ngrams\0\1"
CODEBOOK = 256  # values
NEVER = -50  # log10 P(<s>) is -99 by convention
ROUNDS = 20  # of improving a codebook
RANKED, SUMMED = 256, 16  # n-grams in a block of the bits of contexts, contexts in one of counts
ALIGNED = 8  # bytes that arrays begin at multiples of
FORMATS: dict[str, Any] = {"u1": "B", "u2": "H", "u4": "I", "f4": "f"}  # of NumPy and of memoryview

Arrays = dict[str, Any]  # of memoryviews
State = tuple[int, ...]  # for n = 1, 2, …: the context that the last n words are, or -1
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Ngrams:
    """A compiled model; scores are log10 probabilities.

    A state is what matters of the words before: equal states have equal futures.
    """

    def __init__(self, data: bytes | mmap.mmap) -> None:
        """Takes what `compile_model` makes; ValueError for anything else, also if it is cut off."""
        orders, arrays = _read(data)
        words = zlib.decompress(arrays["words"]).decode("utf-8")
        self.words: list[str] = words.split("\n")
        self._levels = [_Level(arrays, n, n == orders) for n in range(1, orders + 1)]
        self._begin, self._end, self.unknown = map(self.find, (BEGIN, END, UNKNOWN))

    def find(self, word: str) -> int:
        """The number of a word, or -1."""
        at = bisect_left(self.words, word)
        return at if at < len(self.words) and self.words[at] == word else -1

    def unigrams(self) -> Floats:
        """The scores (V,) of all words where nothing is known."""
        return self._levels[0].log_probs.all()

    def start(self) -> State:
        """The state at the beginning of a sentence."""
        return self.score((), self._begin)[1]

    def end(self, state: State) -> float:
        """The score of the end of a sentence."""
        return self.score(state, self._end)[0]

    def score(self, state: State, word: int) -> tuple[float, State]:
        """The score of a word, and the state after it; `()` is the state that knows nothing."""
        level, found = self._levels[0], word  # the longest n-gram there is that ends in the word
        backoff = 0.0
        after = [level.context(word)]
        for context, shorter, longer in zip(state, self._levels, self._levels[1:], strict=False):
            if context < 0:
                after.append(-1)
                continue
            at = longer.find(word, *shorter.children(context))
            if at >= 0:
                level, found, backoff = longer, at, 0.0
                after.append(longer.context(at))
            else:
                after.append(-1)
                backoff += shorter.backoffs[context]
        while after and after[-1] < 0:
            after.pop()
        return level.log_probs[found] + backoff, tuple(after)


class _Level:
    """The n-grams of one order."""

    def __init__(self, arrays: Arrays, n: int, highest: bool) -> None:
        self.log_probs = _Values(arrays, f"log_probs{n}")
        self._words = arrays[f"words{n}"] if n > 1 else ()
        self._contexts = None if highest else arrays[f"contexts{n}"]
        if not highest:
            self._ranks = arrays[f"ranks{n}"]
            self._counts, self._firsts = arrays[f"counts{n}"], arrays[f"firsts{n}"]
            self.backoffs = _Values(arrays, f"backoffs{n}")

    def context(self, ngram: int) -> int:
        """Which context an n-gram is; -1 if it is none, or is not there itself (-1)."""
        if ngram < 0 or self._contexts is None:
            return -1
        block, bit = divmod(ngram, RANKED)
        size = RANKED // 8
        bits = int.from_bytes(self._contexts[block * size : block * size + size], "little")
        if not bits >> bit & 1:
            return -1
        return self._ranks[block] + (bits & ((1 << bit) - 1)).bit_count()

    def children(self, context: int) -> tuple[int, int]:
        """The longer n-grams that begin with a context: the first and the one after the last."""
        block = context // SUMMED
        first = self._firsts[block] + sum(self._counts[block * SUMMED : context])
        return first, first + self._counts[context]

    def find(self, word: int, low: int, high: int) -> int:
        """Which of the n-grams low..high - 1 ends in a word, or -1."""
        at = bisect_left(self._words, word, low, high)
        return at if at < high and self._words[at] == word else -1


class _Values:
    """Floats, as they are or by a codebook."""

    def __init__(self, arrays: Arrays, name: str) -> None:
        self._values = arrays[name]
        self._codebook = arrays.get(f"{name}_codebook")

    def __getitem__(self, index: int) -> float:
        value = self._values[index]
        return value if self._codebook is None else self._codebook[value]

    def all(self) -> Floats:
        """All of them."""
        values = np.array(self._values)
        return values if self._codebook is None else np.array(self._codebook)[values]


def load_ngrams(path: str | Path) -> Ngrams:
    """Maps a compiled file; ValueError, in one line, for one that is damaged."""
    try:
        with open(path, "rb") as file:
            return Ngrams(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise ValueError(f"{path}: not a usable compiled language model: {error}") from None


def compile_model(model: NgramModel, exact: bool = False) -> bytes:
    """The compiled form, with float32 values if `exact`; ValueError for a model with gaps."""
    vocabulary, ranked = _sort(model)
    words = zlib.compress("\n".join(vocabulary).encode("utf-8"), 9)
    arrays = {"words": np.frombuffer(words, np.uint8)}
    for n, (key, log, backoff) in enumerate(ranked, 1):
        arrays |= _values(f"log_probs{n}", log, exact)
        if n > 1:
            arrays[f"words{n}"] = _smallest(key % len(vocabulary), len(vocabulary))
        if n < len(ranked):
            children = np.bincount(ranked[n][0] // len(vocabulary), minlength=len(key))  # (N,)
            contexts = (backoff != 0) | (children > 0)
            before = np.append(0, np.cumsum(contexts))
            counts = children[contexts]
            firsts = np.append(0, np.cumsum(counts))
            arrays |= {
                f"contexts{n}": np.packbits(contexts, bitorder="little"),
                f"ranks{n}": before[:-1:RANKED].astype("<u4"),
                f"counts{n}": _smallest(counts, counts.max(initial=0)),
                f"firsts{n}": firsts[:-1:SUMMED].astype("<u4"),
                **_values(f"backoffs{n}", backoff[contexts], exact),
            }
    return _write(len(ranked), arrays)


def _sort(model: NgramModel) -> tuple[list[str], list[tuple[Ints, Floats, Floats]]]:
    """The words by the alphabet, and of each order rising keys, log probabilities, back-offs.

    A key is the place of an n-gram's first n - 1 words, times the number of words, plus its last.
    """
    order = sorted(range(len(model.vocabulary)), key=model.vocabulary.__getitem__)
    vocabulary = [model.vocabulary[i] for i in order]
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    ranked: list[tuple[Ints, Floats, Floats]] = []
    for grams, log, backoff in model.orders:
        key = np.zeros(len(grams), np.int64)
        for k, column in enumerate(number[grams].T):
            if k:
                keys = ranked[k - 1][0]
                place = np.searchsorted(keys, key)
                missing = np.flatnonzero(keys.take(place, mode="clip") != key)
                if len(missing):
                    gram = [model.vocabulary[i] for i in grams[missing[0]]]
                    raise ValueError(f"{' '.join(gram)!r} without {' '.join(gram[:k])!r}")
                key = place
            key = key * len(vocabulary) + column
        at = np.argsort(key)
        if (np.diff(key[at]) == 0).any():
            raise ValueError(f"one of the {grams.shape[1]}-grams stands twice")
        ranked.append((key[at], log[at], backoff[at]))
    return vocabulary, ranked


def _values(name: str, values: Floats, exact: bool) -> dict[str, npt.NDArray[Any]]:
    """The arrays of `_Values`."""
    if exact:
        return {name: values.astype("<f4")}
    codebook = _codebook(values)
    codes = _nearest(codebook, values).astype(np.uint8)
    return {name: codes, f"{name}_codebook": codebook.astype("<f4")}


def _codebook(values: Floats) -> Floats:
    """At most CODEBOOK values, rising, near to which all `values` lie (Lloyd 1982)."""
    codebook = np.unique(values)
    if len(codebook) > CODEBOOK:
        least = codebook[codebook > NEVER][0]
        codebook = np.unique([codebook[0], *np.linspace(least, codebook[-1], CODEBOOK - 1)])
        for _ in range(ROUNDS):
            codes = _nearest(codebook, values)
            counts = np.bincount(codes)
            codebook = np.bincount(codes, values)[counts > 0] / counts[counts > 0]
    return codebook


def _nearest(codebook: Floats, values: Floats) -> Ints:
    """The number of the entry nearest to each value."""
    return np.searchsorted((codebook[1:] + codebook[:-1]) / 2, values)


def _smallest(numbers: Ints, highest: int) -> npt.NDArray[Any]:
    """The numbers in as few bytes as `highest` needs."""
    return numbers.astype(np.min_scalar_type(highest).newbyteorder("<"))


def _write(orders: int, arrays: dict[str, npt.NDArray[Any]]) -> bytes:
    listed = {name: (array.dtype.str[1:], array.nbytes) for name, array in arrays.items()}
    header = json.dumps({"orders": orders, "arrays": listed}).encode()
    parts = [MAGIC, len(header).to_bytes(4, "little"), header]
    parts.append(bytes(-sum(map(len, parts)) % ALIGNED))
    for array in arrays.values():
        parts += [array.tobytes(), bytes(-array.nbytes % ALIGNED)]
    return b"".join(parts)


def _read(data: bytes | mmap.mmap) -> tuple[int, Arrays]:
    """The number of orders and the arrays."""
    view = memoryview(data)
    if view[: len(MAGIC)] != MAGIC:
        raise ValueError("it begins otherwise, or was written by a newer version")
    at = len(MAGIC) + 4
    size = int.from_bytes(view[len(MAGIC) : at], "little")
    header = json.loads(bytes(view[at : at + size]))
    at += size
    arrays: Arrays = {}
    for name, (kind, length) in header["arrays"].items():
        at += -at % ALIGNED
        arrays[name] = view[at : at + length].cast(FORMATS[kind])
        at += length
    if at + -at % ALIGNED != len(view):
        raise ValueError(f"it has {len(view)} bytes and should have {at + -at % ALIGNED}")
    return header["orders"], arrays
