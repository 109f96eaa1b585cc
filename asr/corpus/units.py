"""Speech for texts that nobody has read: a front's frames, put together from units of recordings.

A unit is what a front made of some phonemes in a row, cut where each is heard best, so that two
units which share a phoneme join in the middle of it: concatenative synthesis (Hunt & Black 1996,
*Unit selection*), of hidden frames instead of waveforms. Blocks behind a front that keeps its
weights learn spelling from it, of words that no recording has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from asr.runtime.files import whole_file
from asr.runtime.words import align

END, BOUNDARY = 0, 1  # symbols: where a recording begins and ends, and between two words
LONGEST = 10  # phonemes by which units are found, six bits each
TRIED = 24  # occurrences among which one of the same speaker is preferred

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float32]


@dataclass
class Units:
    """Recordings behind a front, with what is said in them: M phonemes in N frames.

    Every recording begins and ends with END; between words is BOUNDARY.
    """

    hidden: npt.NDArray[np.float16]  # (N, D)
    phones: Ints  # (M,) places in `names`, below 63
    peaks: Ints  # (M,) the frame in which each is heard best
    speakers: Ints  # (M,)
    names: list[str]
    _order: Ints = field(init=False, repr=False)
    _keys: npt.NDArray[np.uint64] = field(init=False, repr=False)  # of LONGEST phones, sorted

    def __post_init__(self) -> None:
        padded = np.concatenate([self.phones, np.full(LONGEST, 63)]).astype(np.uint64)
        keys = np.zeros(len(self.phones), np.uint64)
        for place in range(LONGEST):
            keys |= padded[place : place + len(keys)] << shift(place)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def save(self, path: str | Path) -> None:
        """Writes an .npz file, whole or not at all."""
        with whole_file(path, binary=True) as file:
            np.savez(
                file, hidden=self.hidden, phones=self.phones, peaks=self.peaks,
                speakers=self.speakers, names=np.array(self.names),
            )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> Units:
        """Reads what `save` wrote; ValueError for another file."""
        try:
            with np.load(path) as found:
                hidden, phones, peaks = found["hidden"], found["phones"], found["peaks"]
                return cls(hidden, phones, peaks, found["speakers"], found["names"].tolist())
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; scripts/cut_units.py writes one") from None
        except (KeyError, ValueError, OSError):
            raise ValueError(f"{path}: not a file of scripts/cut_units.py") from None

    def spell(self, words: Sequence[str], lexicon: Mapping[str, Sequence[int]]) -> list[int]:
        """The symbols of a sentence; KeyError for a word that is not in the lexicon."""
        between = [symbol for word in words for symbol in (*lexicon[word], BOUNDARY)]
        return [END, *between[:-1], END]

    def speak(self, symbols: Sequence[int], rng: np.random.Generator) -> Floats | None:
        """Frames (T, D) of a sentence; None where two of its phonemes stand side by side nowhere.

        Each unit is the longest that there is, if possible of the speaker of the one before.
        """
        parts: list[Floats] = []
        speaker, at = -1, 0
        while at < len(symbols) - 1:
            first, last, length = self._find(symbols[at:])
            if length < 2:
                return None
            places = self._order[first + rng.integers(0, last - first, min(TRIED, last - first))]
            same = places[self.speakers[places] == speaker]
            place = int((same if len(same) else places)[0])
            speaker, at = int(self.speakers[place]), at + length - 1
            begin, end = self.peaks[place], self.peaks[place + length - 1]
            frames = self.hidden[begin : end + 1].astype(np.float32)
            if parts:
                frames[0] = (frames[0] + parts[-1][-1]) / 2
                parts[-1] = parts[-1][:-1]
            parts.append(frames)
        return np.concatenate(parts)

    def _find(self, symbols: Sequence[int]) -> tuple[int, int, int]:
        """The range of keys that begin with as many of the symbols as possible, and how many."""
        found = 0, 0, 0
        first, last, key = 0, len(self._keys), np.uint64(0)
        for place, symbol in enumerate(symbols[:LONGEST]):
            key |= np.uint64(symbol) << shift(place)
            above = key + (np.uint64(1) << shift(place))
            part = self._keys[first:last]
            first, last = (
                first + int(np.searchsorted(part, key)),
                first + int(np.searchsorted(part, above)),
            )
            if first == last:
                break
            found = first, last, place + 1
        return found


def shift(place: int) -> np.uint64:
    """How many bits further up than the last one a symbol of a key is."""
    return np.uint64(6 * (LONGEST - 1 - place))


def find_peaks(log_probs: npt.NDArray[np.floating], symbols: Ints) -> tuple[Ints, float]:
    """The frames (S,) in which `symbols` (S,) are heard best in log_probs (T, V), the blank first.

    On the likeliest CTC path, and its log-probability a frame; ValueError for too few frames.
    """
    spans = align(log_probs, symbols.tolist())  # (S, 2)
    path = np.zeros(len(log_probs), np.intp)
    peaks = np.zeros(len(symbols), np.intp)
    for number, (symbol, (first, stop)) in enumerate(zip(symbols, spans, strict=True)):
        path[first:stop] = symbol
        peaks[number] = first + log_probs[first:stop, symbol].argmax()
    return peaks, float(log_probs[np.arange(len(path)), path].mean())
