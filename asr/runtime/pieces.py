"""A recording of any length cut in pauses: blocks of samples in, pieces of speech out.

Memory does not grow with the recording: half a minute of it is held. A piece is at most
`WINDOW` seconds long. Pauses of `PAUSE` seconds and more are left out; where somebody speaks on for
longer than a window, the cut falls into the longest shorter pause, and only where there is none do
two pieces overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asr.runtime.vad import FRAMES_PER_SECOND, Detector, Levels, Waveform

WINDOW, OVERLAP = 25.0, 4.0  # seconds of a piece at most; shared where there is no pause
STEP = 30  # frames that are heard at once
PAUSE = 100  # frames of silence that are left out; a shorter silence stays, at the ends too
PAD = 30  # frames of a longer silence that stay beside speech, and on to the grid:
GRID = 40  # frames; pieces begin and end at multiples, so that a doubtful frame moves no border
BLIP = 10  # frames: what sounds for so short a time and alone is a click
SHORT_PAUSE = 10  # frames of quiet within speech that a cut may fall in
LEAST, REST = 10 * FRAMES_PER_SECOND, 5 * FRAMES_PER_SECOND  # frames before and behind such a cut

Frames = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """A piece of a recording, mono."""

    start: int  # the place of its first sample in the recording
    waveform: Waveform  # (N,), at most WINDOW seconds
    overlap: int = 0  # so many of its first samples end the piece before too: speech went on


def cut_in_pauses(
    blocks: Iterable[Waveform], sample_rate: int, detector: Detector | None, unit: int = 1
) -> Iterator[Piece]:
    """The pieces of a recording that comes in `blocks` (N,) of any length, as they become known.

    Without a `detector` all counts as speech without a pause. Where a piece overlaps the one
    before, their starts lie a multiple of `unit` samples apart.
    """
    cutter = Cutter(sample_rate, unit, detector)
    for block in blocks:
        cutter.add(block)
        while piece := cutter.take():
            yield piece
    while piece := cutter.take(final=True):
        yield piece


class Cutter:
    """What is held of a recording, from the end of the last piece on.

    It is heard in steps, and after each it is judged anew where it holds speech, so that the
    pieces depend neither on the blocks it comes in nor on what follows them.
    """

    def __init__(self, sample_rate: int, unit: int, detector: Detector | None) -> None:
        self.hop = sample_rate // FRAMES_PER_SECOND
        self.unit = math.lcm(unit, self.hop)
        self.window = int(WINDOW * sample_rate / self.unit) * self.unit
        self.shared = int(OVERLAP * sample_rate / self.unit) * self.unit
        self.waveform = np.zeros(0, np.float32)
        self.mask = np.zeros(0, bool)
        self.start = 0  # the place of waveform[0] in the recording
        self.overlap = 0  # of the next piece
        self.joined = True  # a short silence here belongs to the next piece
        self._waiting = np.zeros(0, np.float32)  # not heard yet
        self._detector = detector
        self._levels = Levels(sample_rate)

    def add(self, block: Waveform) -> None:
        """A block (N,) that follows what came before."""
        rest = self._waiting
        self._waiting = np.concatenate([rest, block]) if len(rest) else block

    def take(self, final: bool = False) -> Piece | None:
        """The next piece, or None: more must come first, or, if `final`, nothing is left."""
        step = STEP * self.hop
        while len(self._waiting) >= step or (final and len(self._waiting)):
            if piece := self._next(closed=False):
                return piece
            self._hear(self._waiting[:step])
            self._waiting = self._waiting[step:]
        return self._next(closed=final)

    def _hear(self, step: Waveform) -> None:
        self.waveform = np.concatenate([self.waveform, step])
        self._levels.add(step)
        frames = len(self.waveform) // self.hop
        if self._detector is None:
            self.mask = np.ones(frames, bool)
        elif frames:
            self.mask = self._detector(self._levels.decibels())[-frames:]
            self.mask[: self.overlap // self.hop] = True  # the piece before ends with it

    def _next(self, closed: bool) -> Piece | None:
        """The next piece of what is held; it is all there is if `closed`."""
        while self._at_speech():
            quiet = _runs(~self.mask)
            long = quiet[quiet[:, 1] - quiet[:, 0] >= PAUSE]  # none is at the start
            known = closed or len(long) > 0  # where it ends
            frames, stop = len(self.mask), len(self.waveform)
            if len(long):
                frames = self._on_grid(int(long[0, 0]) + PAD + GRID - 1)
                stop = frames * self.hop
            if not known and stop < self.window + REST * self.hop:
                return None
            if stop <= self.window:
                if self.mask[:frames].sum() > BLIP or self.overlap:
                    return self._give(stop)
                self._drop(frames * self.hop)
            elif pause := self._longest_pause(quiet, frames):
                return self._give(pause * self.hop, joined=True)
            else:
                length = self._window_length(stop, known)
                return self._give(length, overlap=self.shared, joined=True)
        return None

    def _at_speech(self) -> bool:
        """Drops a silence at the start of what is held; False if there is no speech behind it."""
        speech = self.mask.any()
        silence = int(self.mask.argmax()) if speech else len(self.mask)
        if silence >= PAUSE or not self.joined:
            self._drop(max(0, self._on_grid(silence - PAD)) * self.hop)
        return bool(speech)

    def _on_grid(self, frame: int, grid: int = GRID) -> int:
        """The frame held at the last multiple of `grid` in the recording that is not behind it."""
        first = self.start // self.hop
        return (first + frame) // grid * grid - first

    def _longest_pause(self, quiet: Frames, frames: int) -> int:
        """The frame in the middle of the longest pause that one may cut in; 0 if there is none."""
        last = min(self.window // self.hop, frames - REST)
        middle = quiet.sum(axis=1) // 2
        fits = (middle >= LEAST) & (middle <= last) & (quiet[:, 1] - quiet[:, 0] >= SHORT_PAUSE)
        if not fits.any():
            return 0
        found = quiet[fits]
        best = int(middle[fits][(found[:, 1] - found[:, 0]).argmax()])
        return self._on_grid(best + SHORT_PAUSE // 2, SHORT_PAUSE)

    def _window_length(self, length: int, known: bool) -> int:
        """Samples of the next of the windows that cover `length`, equal ones if that is all."""
        if not known:
            return self.window
        count = -(-(length - self.shared) // (self.window - self.shared))
        step = -(-(length - self.shared) // count)
        return -(-step // self.unit) * self.unit + self.shared

    def _give(self, length: int, overlap: int = 0, joined: bool = False) -> Piece:
        """A piece of what is held first; the next one shares the last `overlap` samples."""
        piece = Piece(self.start, self.waveform[:length], self.overlap)
        self._drop(length - overlap)
        self.overlap, self.joined = overlap, joined
        return piece

    def _drop(self, count: int) -> None:
        self.waveform = self.waveform[count:]
        self.mask = self.mask[count // self.hop :]
        self.start += count
        self.overlap, self.joined = 0, self.joined and not count


def _runs(mask: npt.NDArray[np.bool_]) -> Frames:
    """First frame and the frame behind the last of every run of True, (runs, 2)."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return edges.reshape(-1, 2)
