"""Makes an n-gram model small: leaves out the n-grams that it misses least (Stolcke 1998).

Without an n-gram its word is said by the shorter history. What that costs is the relative entropy
of the two models: how often the history stands in the text, times what the word, and through the
new back-off weight every word that is not listed, gains or loses.
"""

from __future__ import annotations

import numpy as np

from asr.corpus.ngram import CountedModel, Floats, Ints

LN10 = np.log(10.0)


def prune_by_entropy(model: CountedModel, keep: int) -> CountedModel:
    """The model with `keep` n-grams of two words and more, those that cost most to leave out.

    An n-gram stays where a longer one begins with it. Back-off weights are made anew.
    """
    indices = Index(model)
    costs = [np.full(len(model.vocabulary), np.inf)]
    costs += [cost(model, indices, n) for n in range(2, len(model.orders) + 1)]
    for n in range(len(costs) - 1, 1, -1):
        np.maximum.at(costs[n - 1], indices.find(model.orders[n][0][:, :-1]), costs[n])
    ranked = np.concatenate(costs[1:])
    limit = np.partition(ranked, -keep)[-keep] if 0 < keep < len(ranked) else -np.inf
    chosen = [np.flatnonzero(own >= limit) for own in costs]
    pruned = CountedModel(
        model.vocabulary,
        [
            (words[own], log[own], np.zeros(len(own)))
            for (words, log, _), own in zip(model.orders, chosen, strict=True)
        ],
        [counts[own] for counts, own in zip(model.counts, chosen, strict=True)],
    )
    renormalise(pruned)
    return pruned


def cost(model: CountedModel, indices: Index, n: int) -> Floats:
    """What leaving out each n-gram of order n costs, in nats a word of the text; (N,)."""
    words, log, _ = model.orders[n - 1]
    histories = indices.find(words[:, :-1])
    own, shorter = 10**log, 10 ** score(model, indices, words[:, 1:])
    backoffs = 10 ** model.orders[n - 2][2]
    size = len(backoffs)
    rest = np.maximum(1 - np.bincount(histories, own, size), 1e-9)[histories]
    rest_shorter = np.maximum(1 - np.bincount(histories, shorter, size), 1e-9)[histories]
    new = np.log((rest + own) / (rest_shorter + shorter))
    change = own * (np.log(shorter) + new - np.log(own))
    change += rest * (new - np.log(backoffs[histories]))
    share = model.counts[n - 2] / model.counts[0].sum()
    return -share[histories] * change


def renormalise(model: CountedModel) -> None:
    """Back-off weights with which the probabilities after every history sum to 1; in place."""
    indices = Index(model)
    for n in range(2, len(model.orders) + 1):
        words, log, _ = model.orders[n - 1]
        histories = indices.find(words[:, :-1])
        lower = model.orders[n - 2]
        shorter = 10 ** score(model, indices, words[:, 1:])
        size = len(lower[1])
        rest, rest_shorter = (
            np.maximum(1 - np.bincount(histories, p, size), 1e-9) for p in (10**log, shorter)
        )
        has = np.bincount(histories, minlength=size) > 0
        lower[2][:] = np.where(has, np.log10(rest / rest_shorter), 0.0)


def score(model: CountedModel, indices: Index, words: Ints) -> Floats:
    """log10 probability (N,) of the last of words (N, n) after those before it."""
    place = indices.find(words)
    found = place >= 0
    result = np.append(model.orders[words.shape[1] - 1][1], 0.0)[place]  # 0 where none is found
    if not found.all():
        missing = words[~found]
        history = indices.find(missing[:, :-1])
        backoffs = model.orders[words.shape[1] - 2][2]
        back = np.where(history >= 0, backoffs[history], 0.0)
        result[~found] = back + score(model, indices, missing[:, 1:])
    return result


class Index:
    """Where n-grams stand in a model's sorted lists."""

    def __init__(self, model: CountedModel) -> None:
        self.size = len(model.vocabulary)
        self.codes: list[np.ndarray] = [np.arange(self.size)]
        for words, _, _ in model.orders[1:]:
            prefix = self.find(words[:, :-1])
            self.codes.append(prefix * self.size + words[:, -1])

    def find(self, words: Ints) -> np.ndarray:
        """Places (N,) of the n-grams `words` (N, n) in their order; -1 where it has none."""
        place = words[:, 0].astype(np.int64)
        for n in range(1, words.shape[1]):
            codes = self.codes[n]
            wanted = place * self.size + words[:, n]
            at = np.searchsorted(codes, wanted)
            same = np.append(codes, -1)[at] == wanted
            place = np.where((place >= 0) & same, at, -1)
        return place
