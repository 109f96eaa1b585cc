"""Prefix beam search against the sum over all paths, written down one by one."""

import itertools
import math

import numpy as np
import pytest

from asr.runtime import beam
from asr.runtime.beam import BeamConfig, BeamSearch
from asr.runtime.decoding import greedy_decode

EVERYTHING = {"beam_size": 10**6, "token_threshold": math.inf, "beam_threshold": math.inf}
CHARACTERS = ["<blk>", "▁", "a", "b"]
PIECES = ["<blk>", "▁a", "b", "▁", "▁ab"]


class Bigrams:
    """A scorer from a table of (word before, word); what is not in it scores -6, an unknown word
    -9. States are words."""

    def __init__(self, table: dict, ahead: bool = False) -> None:
        self.table = table
        self.words = {word for _, word in table}
        self.use_ahead = ahead
        self.asked: list = []

    def start(self):
        return "<s>"

    def score(self, state, word):
        self.asked.append((state, word))
        return self.table.get((state, word), -6.0 if word in self.words else -9.0), word

    def end(self, state):
        return self.table.get((state, "</s>"), -1.0)

    def ahead(self, prefix):
        best = [score for (_, word), score in self.table.items() if word.startswith(prefix)]
        return max([-9.0, *best]) if self.use_ahead else 0.0


TABLE = {
    ("<s>", "a"): -0.5, ("a", "b"): -0.25, ("<s>", "ab"): -2.0, ("b", "a"): -1.5, ("b", "b"): -3.0,
    ("a", "</s>"): -2.5, ("ab", "a"): 0.75,
}  # fmt: skip


def random_log_probs(rng: np.random.Generator, *shape: int, sharpness: float = 2) -> np.ndarray:
    x = rng.standard_normal(shape) * sharpness
    return (x - np.logaddexp.reduce(x, axis=-1, keepdims=True)).astype(np.float32)


def collapse(path) -> tuple[int, ...]:
    return tuple(t for t, _ in itertools.groupby(path) if t != 0)


def every_path(log_probs: np.ndarray) -> dict[tuple[int, ...], float]:
    """log P_ctc of every token sequence, from all V ** T' paths."""
    found: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        log_prob = sum(float(frame[t]) for frame, t in zip(log_probs, path, strict=True))
        ids = collapse(path)
        found[ids] = np.logaddexp(found.get(ids, -np.inf), log_prob)
    return found


def ctc_log_prob(log_probs: np.ndarray, ids) -> float:
    """log P_ctc of one token sequence by the forward algorithm (Graves et al. 2006)."""
    symbols = [0, *itertools.chain.from_iterable((t, 0) for t in ids)]
    alpha = np.full(len(symbols), -np.inf)
    alpha[0] = log_probs[0, 0]
    if ids:
        alpha[1] = log_probs[0, symbols[1]]
    for frame in log_probs[1:].astype(np.float64):
        new = alpha.copy()
        new[1:] = np.logaddexp(new[1:], alpha[:-1])
        for s in range(2, len(symbols)):
            if symbols[s] != 0 and symbols[s] != symbols[s - 2]:
                new[s] = np.logaddexp(new[s], alpha[s - 2])
        alpha = new + frame[symbols]
    return float(np.logaddexp.reduce(alpha[-2:]))


def word_score(tokens: list[str], scorer: Bigrams, ids) -> float:
    words = "".join(tokens[i] for i in ids).replace("▁", " ").split()
    total, state = 0.0, scorer.start()
    for word in words:
        score, state = scorer.score(state, word)
        total += score
    return total + scorer.end(state)


# ---- the sum over paths -----------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tokens", [CHARACTERS, PIECES[:4], PIECES[:3]])
def test_a_full_beam_sums_all_paths(frames, seed, tokens):
    log_probs = random_log_probs(np.random.default_rng(seed), frames, len(tokens))
    expected = every_path(log_probs)
    found = BeamSearch(tokens, BeamConfig(**EVERYTHING)).search(log_probs)
    assert {tuple(h.ids) for h in found} == set(expected)
    for h in found:
        assert h.log_prob == h.score == pytest.approx(expected[tuple(h.ids)], abs=1e-6)
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    assert np.logaddexp.reduce([h.log_prob for h in found]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tokens", [CHARACTERS, PIECES])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_full_beam_adds_the_words_of_a_language_model(seed, tokens, ahead, monkeypatch):
    monkeypatch.setattr(beam, "unlike", lambda prefixes, _: range(len(prefixes)))
    log_probs = random_log_probs(np.random.default_rng(seed), 5, len(tokens))
    scorer = Bigrams(TABLE, ahead)
    found = BeamSearch(tokens, BeamConfig(**EVERYTHING), scorer).search(log_probs)
    expected = {
        ids: log_prob + word_score(tokens, scorer, ids)
        for ids, log_prob in every_path(log_probs).items()
    }
    assert {tuple(h.ids): h.score for h in found} == pytest.approx(expected, abs=1e-6)
    assert tuple(found[0].ids) == max(expected, key=expected.__getitem__)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tokens", [CHARACTERS, PIECES])
def test_texts_with_one_future_are_recombined_to_the_best(seed, tokens, monkeypatch):
    """A full beam finds the same best text, and of all with its last word and state only that."""
    log_probs = random_log_probs(np.random.default_rng(seed), 6, len(tokens))
    search = BeamSearch(tokens, BeamConfig(**EVERYTHING), Bigrams(TABLE))
    found = search.search(log_probs)
    monkeypatch.setattr(beam, "unlike", lambda prefixes, _: range(len(prefixes)))
    everything = search.search(log_probs)
    assert len(found) < len(everything) / 2
    assert found[0].ids == everything[0].ids
    futures = set()
    for h in found:
        before, _, word = "".join(tokens[i] for i in h.ids).rpartition("▁")
        state = ["<s>", *before.replace("▁", " ").split()][-1]
        futures.add((state, word, *h.ids[-1:]))
    assert len(futures) == len(found)


def test_a_token_comes_twice_only_over_a_blank():
    sure = np.log(np.array([[0.01, 0.01, 0.97, 0.01]] * 3))
    assert BeamSearch(CHARACTERS, BeamConfig())(sure) == [2]
    sure[1] = np.log([0.97, 0.01, 0.01, 0.01])
    assert BeamSearch(CHARACTERS, BeamConfig())(sure) == [2, 2]


def test_the_likeliest_text_can_differ_from_the_likeliest_path():
    """Blank wins each frame with 0.6, but the paths with an `a` sum to 1 - 0.36 = 0.64."""
    log_probs = np.log(np.array([[0.6, 1e-9, 0.4, 1e-9]] * 2))
    assert greedy_decode(log_probs) == []
    best = BeamSearch(CHARACTERS, BeamConfig()).search(log_probs)[0]
    assert best.ids == [2]
    assert math.exp(best.log_prob) == pytest.approx(0.64, abs=1e-6)


# ---- pruning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_a_small_beam_is_at_least_as_likely_as_greedy(seed):
    tokens = ["<blk>", "▁", *"abcdefghijklmnopqrstuvwxyz'"]
    log_probs = random_log_probs(np.random.default_rng(seed), 40, len(tokens), sharpness=1.5)
    found = BeamSearch(tokens, BeamConfig(beam_size=16)).search(log_probs)
    greedy = ctc_log_prob(log_probs, greedy_decode(log_probs))
    assert len(found) <= 16
    assert ctc_log_prob(log_probs, found[0].ids) >= greedy - 1e-6
    for h in found:  # what pruning lost can only be missing
        assert h.log_prob <= ctc_log_prob(log_probs, h.ids) + 1e-6


def test_a_wider_beam_finds_no_worse_text():
    log_probs = random_log_probs(np.random.default_rng(3), 60, 4, sharpness=0.5)
    scores = [
        BeamSearch(CHARACTERS, BeamConfig(beam_size=n), Bigrams(TABLE)).search(log_probs)[0].score
        for n in (1, 4, 64, 1024)
    ]
    assert scores[0] <= scores[2] <= scores[3]
    assert scores[1] <= scores[3]


def test_a_sure_model_is_read_like_greedy_with_any_beam():
    rng = np.random.default_rng(0)
    log_probs = random_log_probs(rng, 100, 4, sharpness=0.1)
    log_probs[np.arange(100), rng.integers(0, 4, 100)] += 12
    log_probs -= np.logaddexp.reduce(log_probs, axis=-1, keepdims=True)
    for size in (1, 2, 50):
        config = BeamConfig(beam_size=size)
        assert BeamSearch(CHARACTERS, config)(log_probs) == greedy_decode(log_probs)


def test_a_threshold_of_zero_keeps_only_the_best():
    log_probs = random_log_probs(np.random.default_rng(4), 60, 4, sharpness=1)
    for scorer in (None, Bigrams(TABLE)):
        zero, one = (
            BeamSearch(CHARACTERS, BeamConfig(**options), scorer).search(log_probs)
            for options in ({"beam_threshold": 0.0}, {"beam_size": 1, "beam_threshold": math.inf})
        )
        assert zero == one
        assert len(zero) == 1


def test_forgetting_prefixes_changes_nothing(monkeypatch):
    log_probs = random_log_probs(np.random.default_rng(1), 150, 4, sharpness=1)
    search = BeamSearch(CHARACTERS, BeamConfig(beam_size=12), Bigrams(TABLE))
    expected = search.search(log_probs)
    sizes: list[int] = []
    forget = beam._Beam._forget

    def counted(b):
        forget(b)
        sizes.append(len(b.known))

    monkeypatch.setattr(beam, "KEPT_PREFIXES", 20)
    monkeypatch.setattr(beam._Beam, "_forget", counted)
    assert search.search(log_probs) == expected
    assert len(sizes) > 5
    assert max(sizes) < 300


def test_no_frames_are_no_text():
    assert BeamSearch(CHARACTERS, BeamConfig())(np.zeros((0, 4), np.float32)) == []


# ---- words ------------------------------------------------------------------------------------


def spelled(*choices: str) -> np.ndarray:
    """log_probs over CHARACTERS: a frame of equal chances for each string, then a blank."""
    frames = []
    for letters in choices:
        chances = np.full(4, 1e-6)
        chances[[CHARACTERS.index(c) for c in letters]] = 1 / len(letters)
        frames += [chances, np.array([1.0, 1e-6, 1e-6, 1e-6])]
    return np.log(np.array(frames))


def test_the_language_model_decides_between_like_sounds():
    unsure = spelled("ab", "▁", "ab")
    for table, expected in (
        ({("<s>", "a"): -1.0, ("a", "b"): -1.0}, "a b"),
        ({("<s>", "b"): -1.0, ("b", "b"): -1.0, ("<s>", "a"): -1.0}, "b b"),
    ):
        ids = BeamSearch(CHARACTERS, BeamConfig(), Bigrams(table))(unsure)
        assert "".join(CHARACTERS[i] for i in ids).replace("▁", " ") == expected


def test_an_unknown_word_is_written_where_it_is_clearly_said():
    scorer = Bigrams({("<s>", "a"): -1.0})
    assert BeamSearch(CHARACTERS, BeamConfig(), scorer)(spelled("b", "b")) == [3, 3]


def test_a_word_is_asked_for_once_and_when_it_is_complete():
    scorer = Bigrams(TABLE)
    ids = BeamSearch(CHARACTERS, BeamConfig(), scorer)(spelled("a", "b", "▁", "▁", "b"))
    assert ids == [2, 3, 1, 1, 3]
    assert scorer.asked.count(("<s>", "ab")) == 1
    assert ("ab", "") not in scorer.asked


def test_looking_ahead_keeps_the_only_word_in_a_narrow_beam():
    """The sounds of the first letter prefer an `a`, and no word begins with one."""
    log_probs = spelled("ab", "b", "b")
    log_probs[0, 2] += 3
    table = {("<s>", "bbb"): 0.0}
    for size, ahead, expected in ((1, False, "abb"), (3, False, "bbb"), (2, True, "bbb")):
        ids = BeamSearch(CHARACTERS, BeamConfig(beam_size=size), Bigrams(table, ahead))(log_probs)
        assert "".join(CHARACTERS[i] for i in ids) == expected


# ---- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 0}, "beam_size 0 must be at least 1"),
        ({"lm_weight": -1.0}, "lm_weight -1.0 must not be negative"),
        ({"beam_threshold": math.nan}, "must not be negative"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BeamConfig(**options)


def test_wrong_log_probs_are_refused():
    search = BeamSearch(CHARACTERS, BeamConfig())
    with pytest.raises(ValueError, match=r"\(5, 3\); expected \(frames, 4\)"):
        search(np.zeros((5, 3)))
    with pytest.raises(ValueError, match="NaN"):
        search(np.full((5, 4), np.nan))
