"""A recording of any length cut in pauses: blocks of samples in, pieces of speech out.

Memory does not grow with the recording: two or three minutes of it are held. A piece is at most
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

from asr.runtime.vad import FRAMES_PER_SECOND, Detector, Mask, Waveform

WINDOW, OVERLAP = 25.0, 4.0  # seconds of a piece at most; shared where there is no pause
CHUNK = 30  # seconds that are judged at once, with as many before and after
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
    cutter = Cutter(sample_rate, unit)
    for chunk, mask in _judge(blocks, sample_rate, detector):
        cutter.add(chunk, mask)
        while piece := cutter.take(final=False):
            yield piece
    while piece := cutter.take(final=True):
        yield piece


def _judge(
    blocks: Iterable[Waveform], sample_rate: int, detector: Detector | None
) -> Iterator[tuple[Waveform, Mask]]:
    """Chunks of the recording and which of their frames are speech, judged with their neighbours.

    The last chunk may end in a part of a frame.
    """
    hop = sample_rate // FRAMES_PER_SECOND
    before = np.zeros(0, np.float32)
    chunks = _equal_chunks(blocks, CHUNK * FRAMES_PER_SECOND * hop)
    now = next(chunks, None)
    while now is not None:
        after = next(chunks, None)
        frames = len(now) // hop
        short = not len(before) and after is None and frames < FRAMES_PER_SECOND
        if detector is None or short:  # a word cut out closely may be as steady as a hum
            mask = np.ones(frames, bool)
        else:
            near = [before, now] if after is None else [before, now, after]
            mask = detector(np.concatenate(near), sample_rate)[len(before) // hop :][:frames]
        yield now, mask
        before, now = now, after


def _equal_chunks(blocks: Iterable[Waveform], size: int) -> Iterator[Waveform]:
    """The same samples in chunks of `size`; the last one may be shorter, none is empty."""
    waiting: list[Waveform] = []
    count = 0
    for block in blocks:
        while len(block):
            waiting.append(block[: size - count])
            count += len(waiting[-1])
            block = block[len(waiting[-1]) :]
            if count == size:
                yield np.concatenate(waiting)
                waiting, count = [], 0
    if count:
        yield np.concatenate(waiting)


class Cutter:
    """What is held of a recording, from the end of the last piece on."""

    def __init__(self, sample_rate: int, unit: int) -> None:
        self.hop = sample_rate // FRAMES_PER_SECOND
        self.unit = math.lcm(unit, self.hop)
        self.window = int(WINDOW * sample_rate / self.unit) * self.unit
        self.shared = int(OVERLAP * sample_rate / self.unit) * self.unit
        self.waveform = np.zeros(0, np.float32)
        self.mask = np.zeros(0, bool)
        self.start = 0  # the place of waveform[0] in the recording
        self.overlap = 0  # of the next piece
        self.joined = True  # a short silence here belongs to the next piece

    def add(self, chunk: Waveform, mask: Mask) -> None:
        """A chunk that follows what is held, and which of its frames are speech."""
        self.waveform = np.concatenate([self.waveform, chunk])
        self.mask = np.concatenate([self.mask, mask])

    def take(self, final: bool) -> Piece | None:
        """The next piece, or None: more must be heard first, or, if `final`, nothing is left."""
        while self._at_speech():
            quiet = _runs(~self.mask)
            long = quiet[quiet[:, 1] - quiet[:, 0] >= PAUSE]  # none is at the start
            closed = final or len(long) > 0
            frames, stop = len(self.mask), len(self.waveform)
            if len(long):
                frames = self._on_grid(int(long[0, 0]) + PAD + GRID - 1)
                stop = frames * self.hop
            if not closed and stop < self.window + REST * self.hop:
                return None
            if stop <= self.window:
                if self.mask[:frames].sum() > BLIP or self.overlap:
                    return self._give(stop)
                self._drop(frames * self.hop)
            elif pause := self._longest_pause(quiet, frames):
                return self._give(pause * self.hop, joined=True)
            else:
                length = self._window_length(stop, closed)
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

    def _window_length(self, length: int, closed: bool) -> int:
        """Samples of the next of the windows that cover `length`, equal ones if that is all."""
        if not closed:
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


def _runs(mask: Mask) -> Frames:
    """First frame and the frame behind the last of every run of True, (runs, 2)."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return edges.reshape(-1, 2)
