"""Kneser-Ney models against their definition, written down without arrays, and against kenlm's."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from asr.corpus.ngram import estimate, estimate_discounts, write_arpa
from tests.arpa import Arpa

WORDS = "one two three four five six".split()


def random_text(seed: int, n: int = 150) -> list[list[str]]:
    """Sentences in which a word likes to be followed by the next one of the list."""
    rng = np.random.default_rng(seed)
    text = []
    for _ in range(n):
        at, sentence = int(rng.integers(6)), []
        for _ in range(rng.integers(0, 7)):
            sentence.append(WORDS[at])
            at = (at + 1) % 6 if rng.random() < 0.7 else min(int(rng.geometric(0.4)), 6) - 1
        text.append(sentence)
    return text


class Reference:
    """Interpolated modified Kneser-Ney (Chen & Goodman 1999, section 4.1.6; Heafield et al. 2013),
    one probability at a time."""

    def __init__(self, text: list[list[str]], order: int, limits: list[int]) -> None:
        sentences = [("<s>", *s, "</s>") for s in text if s]
        self.order, self.limits = order, limits
        self.raw = [
            Counter(s[i : i + n] for s in sentences for i in range(len(s) - n + 1))
            for n in range(1, order + 1)
        ]
        self.counts = [dict(counter) for counter in self.raw]
        for n in range(1, order):
            before = Counter(gram[1:] for gram in self.raw[n])
            self.counts[n - 1] = {
                g: c if g[0] == "<s>" else before[g] for g, c in self.raw[n - 1].items()
            }
        del self.counts[0]["<s>",]
        self.size = len(self.raw[0])  # the words and </s> and <unk>, without <s>
        self.discounts = [self.discounts_of(list(c.values())) for c in self.counts]

    @staticmethod
    def discounts_of(counts: list[int]) -> list[float]:
        n1, n2, n3, n4 = (counts.count(k) for k in (1, 2, 3, 4))
        if not (n1 and n2 and n3):
            return [0.0, 0.5, 1.0, 1.5]
        y = n1 / (n1 + 2 * n2)
        found = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        return found if all(0 < d <= k for k, d in enumerate(found) if k) else [0.0, 0.5, 1.0, 1.5]

    def probability(self, word: str, history: tuple[str, ...]) -> float:
        history = history[max(0, len(history) - self.order + 1) :]
        lower = self.probability(word, history[1:]) if history else 1 / self.size
        n = len(history)
        seen = {g: c for g, c in self.counts[n].items() if g[:-1] == history}
        if not seen:
            return lower
        gram, own, freed = (*history, word), 0.0, 0.0
        for g, c in seen.items():
            discount = self.discounts[n][min(c, 3)]
            kept = self.raw[n][g] > self.limits[n]
            freed += discount if kept else c
            own += c - discount if kept and g == gram else 0
        return (own + freed * lower) / sum(seen.values())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("order", "prune"), [(1, []), (2, []), (3, []), (4, []), (3, [0, 0, 1]), (4, [0, 1, 2, 2])]
)
def test_probabilities_follow_the_definition(order, prune, seed, tmp_path):
    text = random_text(seed)
    write_arpa(tmp_path / "lm.arpa", estimate(text, order, prune))
    arpa = Arpa(tmp_path / "lm.arpa")
    reference = Reference(text, order, prune or [0] * order)
    assert arpa.order == order
    histories = [
        *itertools.chain.from_iterable(itertools.product(WORDS, repeat=n) for n in range(order)),
        *(("<s>", *h) for h in itertools.product(WORDS, repeat=max(0, order - 2))),
    ]
    for history in histories:
        for word in [*WORDS, "</s>", "never"]:
            expected = math.log10(reference.probability(word, history))
            assert arpa.log10(word, history) == pytest.approx(expected, abs=2e-6), (word, history)
    for n in range(order):
        kept = [g for g, c in reference.raw[n].items() if n == 0 or c > reference.limits[n]]
        assert {g for g in arpa.log if len(g) == n + 1} - {("<unk>",)} == set(kept)


@pytest.mark.parametrize("prune", [(0,), (0, 0, 1), (0, 1, 1, 3)])
def test_probabilities_sum_to_one_through_kenlm(prune, tmp_path):
    kenlm = pytest.importorskip("kenlm", reason="kenlm, a reference, is not installed")
    text = random_text(7, 400)
    path = tmp_path / "lm.arpa"
    write_arpa(path, estimate(text, 4, prune))
    model, arpa = kenlm.Model(str(path)), Arpa(path)
    assert model.order == 4
    for history in [(), ("one",), ("two", "three"), ("six", "six", "five"), ("no", "one")]:
        state, after = kenlm.State(), kenlm.State()
        model.NullContextWrite(state)
        for word in history:
            model.BaseScore(state, word, after)
            state, after = after, state
        words = [word for word in arpa.words if word != "<s>"]
        total = sum(10 ** model.BaseScore(state, word, after) for word in words)
        assert total == pytest.approx(1, abs=1e-5)
    for sentence in text[:20]:
        score, history = 0.0, ("<s>",)
        for word in [*sentence, "</s>"]:
            score += arpa.log10(word, history)
            history = (*history, word)
        assert model.score(" ".join(sentence)) == pytest.approx(score, abs=1e-4)


def test_more_text_of_the_same_kind_is_predicted_better():
    def perplexity(model_text, order):
        reference = Reference(model_text, order, [0] * order)
        logs = [
            math.log(reference.probability(w, tuple(["<s>", *s][: i + 1])))
            for s in random_text(99, 60)
            for i, w in enumerate([*s, "</s>"])
            if s
        ]
        return math.exp(-sum(logs) / len(logs))

    assert perplexity(random_text(1, 300), 2) < perplexity(random_text(1, 300), 1) < 7.5


def test_discounts():
    """n1..n4 = 4, 3, 2, 1: Y = 0.4, so 1 - 0.6, 2 - 0.8, 3 - 0.8."""
    counts = np.array([1] * 4 + [2] * 3 + [3] * 2 + [4] + [9] * 5 + [0])
    assert estimate_discounts(counts) == pytest.approx([0, 0.4, 1.2, 2.2])
    assert estimate_discounts(np.array([1, 1, 5])).tolist() == [0, 0.5, 1, 1.5]


def test_the_file_is_what_the_format_asks_for(tmp_path):
    write_arpa(tmp_path / "new" / "lm.arpa", estimate([["b", "a"], ["a"], []], 2, []))
    text = (tmp_path / "new" / "lm.arpa").read_text().splitlines()
    assert text[:5] == ["\\data\\", "ngram 1=5", "ngram 2=4", "", "\\1-grams:"]
    assert [line.split("\t")[1] for line in text[5:10]] == ["<unk>", "<s>", "</s>", "a", "b"]
    assert text[6].startswith("-99\t<s>\t")
    assert text[10:12] == ["", "\\2-grams:"]
    assert [line.split("\t")[1] for line in text[12:16]] == ["<s> a", "<s> b", "a </s>", "b a"]
    assert text[16:] == ["", "\\end\\"]


@pytest.mark.parametrize(
    ("text", "order", "prune", "message"),
    [
        ([[], []], 3, [], "no words in the text"),
        ([["a"]], 0, [], "order 0 must be from 1 to 6"),
        ([["a"]], 7, [], "order 7 must be from 1 to 6"),
        ([["a"]], 3, [1], "must begin with 0"),
        ([["a"]], 3, [0, 2, 1], "and not fall"),
        ([["a", "<s>"]], 3, [], "not words"),
    ],
)
def test_mistakes(text, order, prune, message):
    with pytest.raises(ValueError, match=message):
        estimate(text, order, prune)
