"""Stretches of a recording that the network has read, and how overlapping ones become one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asr.runtime.pieces import Piece

Array = npt.NDArray[np.float32]

LONGEST = 300.0  # seconds of overlapping pieces that are joined: memory has an end


@dataclass(frozen=True)
class Reading:
    """A stretch of a recording and what the network makes of it."""

    start: int  # the place of its first sample in the recording
    waveform: Array  # (N,)
    log_probs: Array  # (T', V)

    def until(self, frame: int, unit: int) -> Reading:
        """Its first frames, of `unit` samples each."""
        return Reading(self.start, self.waveform[: frame * unit], self.log_probs[:frame])

    def after(self, frame: int, unit: int) -> Reading:
        """What is left of it behind its first frames."""
        place = self.start + frame * unit
        return Reading(place, self.waveform[frame * unit :], self.log_probs[frame:])

    def joined_to(self, right: Reading) -> Reading:
        """Both, the right one following."""
        return Reading(
            self.start,
            np.concatenate([self.waveform, right.waveform]),
            np.concatenate([self.log_probs, right.log_probs]),
        )


def join(read: Iterable[tuple[Piece, Array]], unit: int, rate: int) -> Iterator[Reading]:
    """The readings of pieces with their log_probs (T', V); those that overlap are joined.

    A frame stands for `unit` samples, a second for `rate`.
    """
    joined: Reading | None = None
    for piece, log_probs in read:
        right = Reading(piece.start, piece.waveform, log_probs)
        if joined is not None and piece.overlap:
            first = (piece.start - joined.start) // unit
            shared = len(joined.log_probs) - first
            cut = meeting_frame(joined.log_probs[first:], right.log_probs[:shared])
            joined, right = joined.until(first + cut, unit), right.after(cut, unit)
            if len(joined.waveform) < LONGEST * rate:
                joined = joined.joined_to(right)
                continue
        if joined is not None:
            yield joined
        joined = right
    if joined is not None:
        yield joined


def meeting_frame(left: Array, right: Array) -> int:
    """Where to change from `left` to `right`, two readings (n, V) of the same frames.

    The middle of the longest run of frames at which both read a blank, so that no token is lost or
    said twice; of equal ones the nearest to the middle, which it is too where there is none.
    """
    middle = len(left) // 2
    blank = (left.argmax(axis=1) == 0) & (right.argmax(axis=1) == 0)
    runs = np.flatnonzero(np.diff(blank, prepend=False, append=False)).reshape(-1, 2)
    centres = (runs[:, 0] + runs[:, 1]) // 2
    ranks = [(b - a, -abs(c - middle), c) for (a, b), c in zip(runs, centres, strict=True)]
    return int(max(ranks)[2]) if ranks else middle
