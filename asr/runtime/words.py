"""Words with times and confidence, from log_probs and the token ids that were read in them.

A token's frames are those of the likeliest path through its ids (CTC's forced alignment: Graves
2012, the Viterbi path). A CTC model names a token in a frame or two near its sound, so that those
frames say where a word is but not where it begins and ends; `asr.runtime.pauses` moves the borders
beside a pause to where the sound starts and stops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asr.runtime.tokenizer import SPACE, join, word_spans

BAND = 400  # states of an alignment that are looked at in a frame: a token and a blank are two
# The tokens' own probabilities are surer than they should be. To these powers, which fit dev-clean
# (experiments/words/), their product is the share of right words that were read as they sound, and
# their geometric mean that of words from a language model, which mends a doubtful token.
SOUNDED, WORDED = 1.5, 1.3

Array = npt.NDArray[np.floating]
Frames = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Word:
    """A word, its start and end in seconds, and the probability that it is right."""

    text: str
    start: float
    end: float
    confidence: float


def read_words(
    log_probs: Array, ids: Sequence[int], tokens: Sequence[str], seconds: float,
    worded: bool = False,
) -> list[Word]:  # fmt: skip
    """The words of token ids (L,) decoded from log_probs (T', V); a frame lasts `seconds`.

    A word begins with its first token's first frame and ends after its last one's. Its confidence
    comes of its tokens' highest probabilities: `worded` ids are from a language model over words.
    """
    spans = align(log_probs, ids)
    peaks = _peaks(log_probs, ids, spans)
    words: list[Word] = []
    texts = [tokens[i] for i in ids]
    for first, stop in word_spans(texts):
        text = join(texts[first:stop])
        if text:
            first += texts[first] == SPACE
            start, end = seconds * int(spans[first, 0]), seconds * int(spans[stop - 1, 1])
            peak = peaks[first:stop]
            sure = WORDED * float(peak.mean()) if worded else SOUNDED * float(peak.sum())
            words.append(Word(text, start, end, math.exp(min(sure, 0.0))))
    return words


def _peaks(log_probs: Array, ids: Sequence[int], spans: Frames) -> Array:
    """The highest of each token's log_probs (T', V) in its frames, (L,)."""
    if not len(ids):
        return np.zeros(0, np.float32)
    of_frame = np.repeat(np.asarray(ids), spans[:, 1] - spans[:, 0])
    frames = np.concatenate([np.arange(a, b) for a, b in spans.tolist()])
    counts = np.cumsum(spans[:, 1] - spans[:, 0])
    return np.maximum.reduceat(log_probs[frames, of_frame], np.append(0, counts[:-1]))


def align(log_probs: Array, ids: Sequence[int]) -> Frames:
    """First frame and the one after the last (L, 2) of each of `ids` (L,), on the likeliest path.

    log_probs are (T', V) with the blank at 0; ValueError where they have too few frames for `ids`.
    """
    runs = _runs(log_probs.argmax(axis=1))
    if runs[:, 2].tolist() == list(ids):  # as read greedily
        return runs[:, :2]
    path = _best_path(log_probs, ids)  # (T',) states: odd ones are tokens
    found = _runs(np.where(path % 2 == 1, path, 0))
    return found[:, :2]


def _runs(values: npt.NDArray[np.integer]) -> Frames:
    """First, stop and value (R, 3) of the runs of equal values that are not 0."""
    first = np.flatnonzero(np.diff(values, prepend=-1))
    stop = np.append(first[1:], len(values))
    runs = np.stack([first, stop, values[first]], axis=1)
    return runs[runs[:, 2] != 0]


def _best_path(log_probs: Array, ids: Sequence[int]) -> Frames:
    """The states (T',) of the likeliest path: 2 n + 1 is token n, even ones are blanks.

    Only a band of states around the best one is looked at, so that an hour is aligned in the time
    of its frames and not in that of its frames times its tokens.
    """
    n_frames, n_states = len(log_probs), 2 * len(ids) + 1
    width = min(BAND, n_states)
    labels = np.zeros(n_states, np.intp)  # (S,)
    labels[1::2] = ids
    skips = np.full(n_states, -np.inf)  # 0 where the blank before a state may be left out
    skips[3::2] = np.where(labels[3::2] != labels[1:-2:2], 0.0, -np.inf)
    score = np.full(n_states + 2, -np.inf)  # of paths that end in state s, at s + 2
    score[2] = 0.0  # before the first frame: a blank, from which the first token is one step
    came = np.zeros((n_frames, width), np.int8)  # states gone forward on the way to each
    lows = np.zeros(n_frames, np.intp)
    low = 0
    for t, frame in enumerate(log_probs):
        here = slice(low + 2, low + 2 + width)
        best = low + int(score[here].argmax())
        after = max(low, best - width // 2, n_states - width - 2 * (n_frames - 1 - t))
        after = min(after, n_states - width)
        band = slice(after, after + width)
        ways = np.stack([
            score[after + 2 : after + 2 + width], score[after + 1 : after + 1 + width],
            score[band] + skips[band],
        ])  # fmt: skip
        came[t] = ways.argmax(axis=0)
        score[here] = -np.inf
        score[after + 2 : after + 2 + width] = ways.max(axis=0) + frame[labels[band]]
        lows[t] = low = after
    state = n_states - 1 if score[-1] >= score[-2] else n_states - 2
    if score[state + 2] == -np.inf:
        raise ValueError(f"{len(ids)} tokens do not fit into {n_frames} frames")
    path = np.empty(n_frames, np.intp)
    for t in range(n_frames - 1, -1, -1):
        path[t] = state
        state -= int(came[t, state - lows[t]])
    return path
