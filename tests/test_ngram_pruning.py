"""Relative-entropy pruning against its definition, summed over all words; counting against sets."""

import math
from collections import Counter

import numpy as np
import pytest

from asr.corpus.counting import count, number_words
from asr.corpus.ngram import estimate
from asr.corpus.ngram_pruning import Index, cost, prune_by_entropy, score
from tests.test_ngram import random_text

TEXT = [s for s in random_text(0, 300) if s]


def all_log10(model, history):
    """log10 probabilities of every word after a history, those of the pruned model or not."""
    index = Index(model)
    history = history[-(len(model.orders) - 1) :]
    size = len(model.vocabulary)
    rows = np.column_stack([np.tile(history, (size, 1)), np.arange(size)]).astype(np.int32)
    return score(model, index, rows)


def histories(model):
    """All histories of one and two words that stand in a model."""
    return [row for words, _, _ in model.orders[:2] for row in words.tolist() if row[-1] != 2]


@pytest.mark.parametrize("keep", [5, 40, 10_000])
def test_every_history_still_sums_to_one(keep):
    model = prune_by_entropy(estimate(TEXT, 3, (0,), continuation=False), keep)
    for history in histories(model):
        predicted = np.delete(10 ** all_log10(model, history), 1)  # all but <s>
        assert predicted.sum() == pytest.approx(1, abs=1e-6)


def test_keeping_all_changes_nothing():
    model = estimate(TEXT, 3, (0,))
    same = prune_by_entropy(model, 10**9)
    for (words, log, back), (words_2, log_2, back_2) in zip(model.orders, same.orders, strict=True):
        assert np.array_equal(words, words_2)
        assert np.array_equal(log, log_2)
        np.testing.assert_allclose(back, back_2, atol=1e-6)


def test_the_number_that_is_kept():
    model = estimate(TEXT, 3, (0,))
    sizes = [len(words) for words, _, _ in prune_by_entropy(model, 30).orders[1:]]
    assert 30 <= sum(sizes) <= 33  # ties
    assert all(sizes)


def test_the_cost_is_the_relative_entropy():
    """Of the highest order: sum over all words of p log(p / q), q without that one n-gram."""
    model = estimate(TEXT, 2, (0,), continuation=False)
    found = cost(model, Index(model), 2)
    total = sum(model.counts[0].tolist())
    for place in range(0, len(found), 5):
        words, log, back = model.orders[1]
        fewer = [model.orders[0], tuple(np.delete(x, place, 0) for x in (words, log, back))]
        history = int(words[place, 0])
        smaller = estimate(TEXT, 2, (0,), continuation=False)
        smaller.orders = fewer
        smaller.counts[1] = np.delete(smaller.counts[1], place)
        smaller = prune_by_entropy(smaller, 10**9)
        p, q = (np.delete(all_log10(m, [history]), 1) * math.log(10) for m in (model, smaller))
        share = model.counts[0][history] / total
        assert found[place] == pytest.approx(share * float((np.exp(p) * (p - q)).sum()), abs=1e-7)


def test_pruning_costs_less_than_dropping_the_longest():
    """At the same size, entropy pruning predicts a text better than a cutoff by count."""

    def bits(model):
        other = [s for s in random_text(1, 200) if s]
        ids = {w: i for i, w in enumerate(model.vocabulary)}
        rows = [[1, *(ids[w] for w in s), 2] for s in other]
        index, order = Index(model), len(model.orders)
        logs = [
            float(score(model, index, np.array([row[max(0, i - order + 1) : i + 1]], np.int32))[0])
            for row in rows
            for i in range(1, len(row))
        ]
        return -sum(logs) / len(logs)

    cut = estimate(TEXT, 3, (0, 3, 6))
    size = sum(len(words) for words, _, _ in cut.orders[1:])
    assert bits(prune_by_entropy(estimate(TEXT, 3, (0,)), size)) < bits(cut)


@pytest.mark.parametrize("piece", [7, 50, 1 << 20])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_counting_in_pieces_counts_every_ngram(piece, order):
    vocabulary, words = number_words(TEXT)
    levels = count(words, len(vocabulary), order, piece)
    rows = levels[0].word[:, None]
    for n, level in enumerate(levels, 1):
        if n > 1:
            rows = np.column_stack([rows[level.prefix], level.word])
        found = {
            tuple(vocabulary[i] for i in row): c
            for row, c in zip(rows.tolist(), level.count.tolist(), strict=True)
            if c
        }
        sentences = [("<s>", *s, "</s>") for s in TEXT]
        assert found == Counter(s[i : i + n] for s in sentences for i in range(len(s) - n + 1))
        assert level.begins.tolist() == [row[0] == 1 for row in rows.tolist()]
