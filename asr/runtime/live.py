"""Text while somebody speaks: partial results as they grow, final ones at a pause.

The recording is cut by the `Cutter` that cuts files, so that the final words are the file's. What
was said since the last cut is read anew after each of its steps; of a long breath only the last
seconds are, behind words that stay as they are until the final result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import soxr

from asr.runtime.audio import MAX_RATE, MIN_RATE, check_waveform
from asr.runtime.pieces import PAD, Cutter, Piece
from asr.runtime.result import Segment, split_at_pauses
from asr.runtime.vad import FRAMES_PER_SECOND, find_speech
from asr.runtime.words import Word

if TYPE_CHECKING:
    from asr.runtime.recognizer import Recognizer

SHARE = 0.08  # of what is read anew that must have come since: bounds the work of long breaths
LONGEST = 8.0  # seconds that are read anew; of more, what is before a gap stays
KEPT = (2.0, 2.0)  # seconds at least before such a gap, and behind it


@dataclass(frozen=True)
class Event:
    """A segment as it is known now; once it is `final` it does not change any more."""

    segment: Segment
    final: bool


class Listener:
    """Takes a recording as it is made, in chunks, and gives `Event`s.

    A partial event has all that was said since the last final one.
    """

    def __init__(self, recognizer: Recognizer, sample_rate: int) -> None:
        if not MIN_RATE <= sample_rate <= MAX_RATE:
            raise ValueError(
                f"a sample rate of {sample_rate} Hz is not usable ({MIN_RATE} to {MAX_RATE} are)"
            )
        self._recognizer = recognizer
        self._rate = recognizer.info.features.sample_rate
        self._given_rate = sample_rate
        self._resample = None
        if sample_rate != self._rate:
            self._resample = soxr.ResampleStream(sample_rate, self._rate, 1, dtype="float32")
        self._hop = self._rate // FRAMES_PER_SECOND
        detector = recognizer.detector or find_speech
        self._cutter = Cutter(self._rate, recognizer.samples_per_frame, detector)
        self._read = 0  # the sample up to which the last partial result went
        self._pieces: list[Piece] = []  # that the next one overlaps
        self._words: list[Word] = []  # of a long breath, before `_from`
        self._from = 0  # the sample from which on the breath is read anew
        self._shown: Segment | None = None

    def feed(self, chunk: npt.ArrayLike) -> Iterator[Event]:
        """What is known after a chunk (N,) of samples, as `Recognizer.transcribe` takes them."""
        samples = np.asarray(chunk)
        if samples.size:
            waveform = check_waveform(samples, self._given_rate, self._given_rate)
            if self._resample is not None:
                waveform = self._resample.resample_chunk(waveform)
            self._cutter.add(waveform)
        yield from self._final(last=False)
        if self._heard > self._read and self._heard - self._read >= SHARE * self._breath:
            self._read = self._heard
            yield from self._partial()

    def finish(self) -> Iterator[Event]:
        """The rest, when the recording has ended."""
        if self._resample is not None:
            self._cutter.add(self._resample.resample_chunk(np.zeros(0, np.float32), last=True))
        yield from self._final(last=True)

    @property
    def _heard(self) -> int:
        """Samples of the recording that the cutter has heard."""
        return self._cutter.start + len(self._cutter.waveform)

    @property
    def _breath(self) -> int:
        """Samples that the next partial result is read from."""
        return self._heard - max(self._from, self._cutter.start)

    def _final(self, last: bool) -> Iterator[Event]:
        while piece := self._cutter.take(final=last):
            self._pieces.append(piece)
            if self._cutter.overlap:
                continue
            words = [
                word
                for reading in self._recognizer.readings(self._pieces)
                for word in self._recognizer.words(reading)
            ]
            self._pieces, self._words, self._shown = [], [], None
            self._from = self._cutter.start
            for segment in split_at_pauses(words):
                if segment.confidence >= self._recognizer.min_confidence:
                    yield Event(segment, final=True)

    def _partial(self) -> Iterator[Event]:
        """What the cutter holds, if it says something else than before."""
        mask, start = self._cutter.mask, self._cutter.start
        if not mask.any():
            return
        first = max(start + max(0, int(mask.argmax()) - PAD) * self._hop, self._from)
        waveform = self._cutter.waveform[first - start :]
        if len(waveform) < self._recognizer.samples_per_frame:
            return
        (reading,) = self._recognizer.readings([Piece(first, waveform)])
        words = self._recognizer.words(reading)
        said = self._words + words
        if len(waveform) > LONGEST * self._rate:
            self._keep(words, (first + len(waveform)) / self._rate)
        if not said:
            return
        segment = Segment(tuple(said))
        known = self._shown is not None and self._shown.text == segment.text
        if not known and segment.confidence >= self._recognizer.min_confidence:
            self._shown = segment
            yield Event(segment, final=False)

    def _keep(self, words: list[Word], now: float) -> None:
        """Keeps the words before the widest gap that leaves time before it and behind."""
        if len(words) < 2:
            return
        least, most = words[0].start + KEPT[0], now - KEPT[1]
        gaps = [
            (right.start - left.end, n, (left.end + right.start) / 2)
            for n, (left, right) in enumerate(pairwise(words), 1)
            if least < left.end and right.start < most
        ]
        if gaps:
            _, count, at = max(gaps)
            self._words += words[:count]
            self._from = int(at * self._rate)
