"""Where words begin and end beside a pause, by the level of the sound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from asr.runtime.words import Word

HOP = 0.01  # seconds of sound that have one level
QUIET = 38.0  # dB below the loudest of the words beside it: no more heard as speech
ABOVE_NOISE = 8.0  # dB: a level nearer to the quietest is taken for noise
LEAST_BELOW = 15.0  # dB: where noise is nearer than that to speech, no level tells them apart
SHORTEST = 0.2  # seconds; the closure of a plosive is quiet for less
SPECK = 0.03  # seconds of sound that do not end a pause
LATE = 0.3  # seconds that a word may be heard after its tokens
LEAST_APART = 0.12  # seconds between the tokens of words with a pause between them
BRIEFEST = 0.06  # seconds of a word

Levels = npt.NDArray[np.float32]
Span = tuple[float, float]


def settle(words: Sequence[Word], waveform: npt.NDArray[np.float32], rate: int) -> list[Word]:
    """Moves the borders of words (seconds) in a waveform (N,) to where their sound starts and ends.

    Beside a pause: between two words with less than that their border is half way. The words stay
    in order, and within the waveform.
    """
    if not words:
        return []
    level = levels(waveform, rate)
    last = len(waveform) / rate
    around = [None, *((min(w.start, last), min(w.end, last)) for w in words), None]
    borders = [find_pause(level, before, after) for before, after in pairwise(around)]
    starts, ends = [pause[1] for pause in borders[:-1]], [pause[0] for pause in borders[1:]]
    for i in range(len(words) - 1):  # a word named long before it is heard takes from the next
        if ends[i] < starts[i] + BRIEFEST and ends[i] == starts[i + 1]:
            ends[i] = starts[i + 1] = min(starts[i] + BRIEFEST, (starts[i] + ends[i + 1]) / 2)
    times = np.maximum.accumulate(np.stack([starts, ends], axis=1).ravel())
    return [
        replace(word, start=start, end=end)
        for word, (start, end) in zip(
            words, times.clip(0, last).reshape(-1, 2).tolist(), strict=True
        )
    ]


def levels(waveform: npt.NDArray[np.float32], rate: int) -> Levels:
    """The level in dB of every `HOP` of a waveform (N,), (N / rate / HOP,)."""
    hop = int(HOP * rate)
    blocks = waveform[: len(waveform) // hop * hop].reshape(-1, hop)
    power = np.einsum("ij,ij->i", blocks, blocks)
    return 10 * np.log10(power / hop + 1e-10)


def find_pause(level: Levels, before: Span | None, after: Span | None) -> Span:
    """When the word before a pause ends and the one after it starts, in seconds.

    `before` and `after` are when these words' tokens start and end, None beyond the first and the
    last word. Without a pause between them the two words meet half way.
    """
    runs = _quiet_runs(level, before, after)
    ends = [a * HOP for a, b in runs if not before or b * HOP > before[1]]
    starts = [b * HOP for a, b in runs if not after or a * HOP < after[0]]
    if not before or not after:
        end = ends[0] if ends else before[1] if before else 0.0
        return end, starts[-1] if starts else after[0] if after else end
    if ends and starts and ends[0] < starts[-1]:
        return ends[0], starts[-1]
    half = (after[0] - before[1]) / 2
    return before[1] + min(half, LATE), after[0] - min(half, LATE)


def _quiet_runs(level: Levels, before: Span | None, after: Span | None) -> list[tuple[int, int]]:
    """First and one after the last index of the quiet between two words that may be a pause."""
    if before and after and after[0] - before[1] < LEAST_APART:
        return []
    first = min(_index(before[0]), len(level)) if before else 0
    stop = min(_index(after[1] + LATE), len(level)) if after else len(level)
    between = level[first:stop]
    if len(between) < _index(SHORTEST):
        return []
    beside = [
        level[max(_index(a) - 10, 0) : _index(b) + 10] for a, b in filter(None, (before, after))
    ]
    loud, noise = np.concatenate(beside).max(), np.sort(between)[len(between) // 10]
    bound = min(max(loud - QUIET, noise + ABOVE_NOISE), loud - LEAST_BELOW)
    quiet = between < bound
    if np.count_nonzero(quiet) < _index(SHORTEST) // 2:
        return []
    quiet = _without_specks(quiet)
    return [(first + a, first + b) for a, b in _runs(quiet) if b - a >= _index(SHORTEST)]


def _index(seconds: float) -> int:
    return round(seconds / HOP)


def _runs(flags: npt.NDArray[np.bool_]) -> list[list[int]]:
    """First and one after the last index of each run of True."""
    padded = np.zeros(len(flags) + 2, bool)
    padded[1:-1] = flags
    return np.flatnonzero(padded[1:] != padded[:-1]).reshape(-1, 2).tolist()


def _without_specks(quiet: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Quiet without the sounds in it that are no longer than `SPECK`."""
    for a, b in _runs(~quiet):
        if a > 0 and b < len(quiet) and b - a <= _index(SPECK):
            quiet[a:b] = True
    return quiet
