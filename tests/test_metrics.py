"""Error rates against an edit distance written here, intervals against what statistics expects."""

import numpy as np
import pytest

from asr.common.metrics import (
    bootstrap_interval,
    character_counts,
    common_confusions,
    corpus_rates,
    error_rates,
    paired_bootstrap,
    word_counts,
)

PAIRS = [
    ("the cat sat on the mat", "the cat sat on the mat"),
    ("the cat sat on the mat", "a cat sat the mat mat"),
    ("one two three", ""),
    ("one two three", "four five six seven"),
    ("a", "a b c d"),
    ("hello world", "helloworld"),
]


def distance(a, b) -> int:
    """Levenshtein's edit distance of two sequences."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


@pytest.mark.parametrize(("reference", "hypothesis"), PAIRS)
def test_counts_are_the_edit_distance(reference, hypothesis):
    words, characters = (
        word_counts(reference, hypothesis), character_counts(reference, hypothesis)
    )  # fmt: skip
    assert sum(words[:3]) == distance(reference.split(), hypothesis.split())
    assert words[3] == len(reference.split())
    assert sum(characters[:3]) == distance(reference, hypothesis)
    assert characters[3] == len(reference)
    # insertions minus deletions is what the hypothesis is longer by
    assert words[1] - words[2] == len(hypothesis.split()) - len(reference.split())


def test_random_texts_have_their_edit_distance():
    rng = np.random.default_rng(0)
    for _ in range(50):
        reference, hypothesis = (
            " ".join(rng.choice(list("abc"), rng.integers(1, 9))) for _ in range(2)
        )
        expected = distance(reference.split(), hypothesis.split())
        assert sum(word_counts(reference, hypothesis)[:3]) == expected


def test_corpus_rates_weigh_by_words_not_by_utterances():
    rates = error_rates(["a b c d e f g h", "x"], ["a b c d e f g h", "y"])
    assert rates["wer"] == 1 / 9
    assert rates["substitutions"] == 1
    assert rates["insertions"] == rates["deletions"] == 0
    assert rates["words"] == 9


def test_an_empty_reference_counts_insertions():
    rates = error_rates(["a b", ""], ["a b", "c d e"])
    assert rates["insertions"] == 3
    assert rates["wer"] == 1.5
    assert rates["cer"] == 5 / 3


@pytest.mark.parametrize("references", [[], ["", "  "]])
def test_no_words_to_measure_against(references):
    with pytest.raises(ValueError, match="no reference words"):
        error_rates(references, ["x"] * len(references))


def test_as_many_hypotheses_as_references():
    with pytest.raises(ValueError, match="zip"):
        error_rates(["a", "b"], ["a"])


def test_rates_from_counts():
    counts = [word_counts(*pair) for pair in PAIRS]
    characters = [character_counts(*pair) for pair in PAIRS]
    references, hypotheses = zip(*PAIRS, strict=True)
    assert corpus_rates(counts, characters) == error_rates(references, hypotheses)


def test_confusions():
    references = ["the cat sat", "the cat ran", "go", ""]
    hypotheses = ["a cat", "a cat ran off", "go", "off"]
    assert common_confusions(references, hypotheses) == [
        ("", "off", 2), ("the", "a", 2), ("sat", "", 1)
    ]  # fmt: skip
    assert common_confusions(references, hypotheses, most=1) == [("", "off", 2)]


def test_interval_is_that_of_the_binomial():
    """Utterances of one word each: the interval is p +- 1.96 standard errors."""
    errors = [1] * 200 + [0] * 800
    low, high = bootstrap_interval(errors, [1] * 1000)
    width = 1.96 * np.sqrt(0.2 * 0.8 / 1000)
    assert low == pytest.approx(0.2 - width, abs=0.004)  # a tenth of the interval's width
    assert high == pytest.approx(0.2 + width, abs=0.004)


def test_interval_of_a_seed():
    errors, words = [1, 0, 3, 2], [5, 6, 7, 8]
    assert bootstrap_interval(errors, words, seed=1) == bootstrap_interval(errors, words, seed=1)
    assert bootstrap_interval([0, 0], [5, 5]) == (0, 0)
    assert bootstrap_interval([2], [4]) == (0.5, 0.5)


def test_paired_bootstrap_sees_a_small_steady_difference():
    """A word worse in every tenth utterance: far inside either interval, yet certain."""
    rng = np.random.default_rng(0)
    words = rng.integers(5, 20, 400)
    errors = rng.binomial(words, 0.3)
    worse = errors + (np.arange(400) % 10 == 0)
    low, high = bootstrap_interval(errors.tolist(), words.tolist())
    assert low < worse.sum() / words.sum() < high
    result = paired_bootstrap(worse.tolist(), errors.tolist(), words.tolist())
    assert result["delta"] == pytest.approx(40 / words.sum())
    assert 0 < result["interval"][0] < result["delta"] < result["interval"][1]
    assert result["better"] == 0
    assert paired_bootstrap(errors.tolist(), worse.tolist(), words.tolist())["better"] == 1


def test_paired_bootstrap_of_equal_results():
    result = paired_bootstrap([1, 2, 0], [1, 2, 0], [4, 4, 4])
    assert result == {"delta": 0, "interval": [0, 0], "better": 0}
