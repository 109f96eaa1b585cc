"""Estimates word n-gram models from text: interpolated modified Kneser-Ney, written as ARPA.

Chen & Goodman 1999, in the form of Heafield et al. 2013 (kenlm's lmplz): the highest order counts
n-grams, lower orders count the different words before an n-gram; every order has three discounts;
rare n-grams are left out after counting and their probability goes to the lower order.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from asr.corpus.counting import Level, count, number_words
from asr.runtime.arpa import NgramModel
from asr.runtime.files import write_atomically

FALLBACK = np.array([0.0, 0.5, 1.0, 1.5])  # discounts for text too small to tell them (as lmplz's)
MAX_ORDER = 6  # what kenlm is built for

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]


@dataclass
class CountedModel(NgramModel):
    """A model that knows how often each n-gram of each order stands in the text."""

    counts: list[Ints]


def estimate(
    sentences: Iterable[Sequence[str]],
    order: int = 4,
    prune: Sequence[int] = (0, 0, 1),
    continuation: bool = True,
) -> CountedModel:
    """The model of a text of `sentences`, lists of words.

    Without `continuation` the lower orders count as the highest does: better where most n-grams
    are to be pruned afterwards (Chelba et al. 2010). n-grams that stand in the text at most
    `prune[n - 1]` times are left out (the last value holds for higher orders). Raises ValueError
    for a text without words and for wrong settings.
    """
    limits = [*prune, *[prune[-1]] * order][:order] if prune else [0] * order
    if not 1 <= order <= MAX_ORDER:
        raise ValueError(f"order {order} must be from 1 to {MAX_ORDER}")
    if limits[0] != 0 or sorted(limits) != limits:
        raise ValueError(f"prune {limits}: must begin with 0 (no word is left out) and not fall")
    vocabulary, words = number_words(sentences)
    levels = count(words, len(vocabulary), order)
    del words
    return smooth(levels, vocabulary, limits, continuation)


def smooth(
    levels: list[Level], vocabulary: list[str], limits: Sequence[int], continuation: bool = True
) -> CountedModel:
    """Probabilities and back-off weights of the n-grams that are kept."""
    model = CountedModel(vocabulary, [], [])
    orders = model.orders
    lower = np.full(1, 1 / (len(vocabulary) - 1))  # the uniform distribution: no <s>
    kept_words = np.zeros((1, 0), np.int32)
    place = np.zeros(1, np.int64)  # of an n-gram of the order below among those kept
    for n, level in enumerate(levels):
        counts = level.count
        if continuation and n + 1 < len(
            levels
        ):  # not the highest order: how many words come before it
            before = np.bincount(levels[n + 1].suffix, minlength=len(counts))
            counts = np.where(level.begins, counts, before)
        if n == 0:
            counts = np.where(level.begins, 0, counts)
        kept = level.count > limits[n] if n else np.ones(len(counts), bool)
        discounts = estimate_discounts(counts)[np.minimum(counts, 3)]
        totals = np.bincount(level.prefix, counts, len(lower))
        freed = np.bincount(level.prefix, np.where(kept, discounts, counts), len(lower))
        backoff = np.divide(freed, totals, out=np.ones(len(lower)), where=totals > 0)
        if orders:
            orders[-1][2][:] = np.log10(backoff[place >= 0])
        own = (counts - discounts) / totals[level.prefix]
        probability = own + backoff[level.prefix] * lower[level.suffix]
        kept_words = np.column_stack([kept_words[place[level.prefix[kept]]], level.word[kept]])
        log = np.log10(probability[kept])
        if n == 0:
            log[level.begins] = -99.0  # nothing predicts <s>
        orders.append((kept_words, log, np.zeros(len(log))))
        model.counts.append(level.count[kept])
        place = np.where(kept, np.cumsum(kept) - 1, -1)
        lower = probability
    return model


def estimate_discounts(counts: Ints) -> Floats:
    """What is taken off n-grams counted 0, 1, 2 and at least 3 times (Chen & Goodman 1999)."""
    n = np.bincount(counts[counts > 0], minlength=5)[:5].astype(float)
    if not n[1:4].all():
        return FALLBACK
    y = n[1] / (n[1] + 2 * n[2])
    discounts = np.array([k - (k + 1) * y * n[k + 1] / n[k] if k else 0.0 for k in range(4)])
    fits = ((discounts > 0) & (discounts <= np.arange(4)))[1:].all()
    return discounts if fits else FALLBACK


def write_arpa(path: str | Path, model: NgramModel) -> None:
    """Writes an ARPA file, whole or not at all."""
    out = io.StringIO()
    out.write("\\data\\\n")
    for n, (words, _, _) in enumerate(model.orders, 1):
        out.write(f"ngram {n}={len(words)}\n")
    vocabulary = np.array(model.vocabulary, dtype=object)
    for n, (words, log, backoff) in enumerate(model.orders, 1):
        out.write(f"\n\\{n}-grams:\n")
        texts = [" ".join(row) for row in vocabulary[words].tolist()]
        if n < len(model.orders):
            ends = [f"\t{b:.7g}\n" for b in backoff.tolist()]
        else:
            ends = ["\n"] * len(log)
        rows = zip(log.tolist(), texts, ends, strict=True)
        out.writelines(f"{p:.7g}\t{text}{end}" for p, text, end in rows)
    out.write("\n\\end\\\n")
    write_atomically(path, out.getvalue())
