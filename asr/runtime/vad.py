"""Where somebody speaks: a detector that hears energies, alike at any level.

It looks at the waveform after pre-emphasis, which takes away a constant offset and most of a hum,
in frames of 10 ms. What counts is the distance from the quiet and from the loud frames of the last
minute, so that a recording at -60 dBFS is cut like the same one at 0 dBFS. It knows nothing of what
is to come, so that a file is heard as live sound is. It is made to lose nothing: doubt counts as
speech.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Waveform = npt.NDArray[np.float32]
Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]  # (frames,): somebody speaks
Detector = Callable[[Array], Mask]  # of levels (M,) in dB of the frames that were heard last

FRAMES_PER_SECOND = 100
PREEMPHASIS = 0.97
SMOOTH = 5  # frames that are averaged
MEMORY = 60 * FRAMES_PER_SECOND  # frames that tell what is quiet and what loud
FIRST = FRAMES_PER_SECOND  # frames of a recording that cannot tell it yet
ABOVE_FLOOR = 8.0  # dB over the quiet tenth of the frames: speech
BELOW_PEAK = 12.0  # dB under the loudest, or less: speech whatever the floor
RANGE = 60.0  # dB under the loudest, or more: silence whatever the floor
STEADY = 6.0  # dB from the quietest to the loudest: a sound that steady is no speech
RANK = 10  # frames louder than the loudest that counts, so that a click does not; quieter likewise
ZERO = 1e-14  # of a square: -140 dB, the floor of digital silence


def find_speech(levels: Array) -> Mask:
    """Which frames of 10 ms hold speech, by their levels (M,) in dB; of very few, all."""
    if len(levels) < FIRST:  # a word cut out closely may be as steady as a hum
        return np.ones(len(levels), bool)
    return levels > threshold(levels)


class Levels:
    """The levels of the frames of a recording that comes in chunks; the last minute's are held."""

    def __init__(self, sample_rate: int) -> None:
        self._hop = sample_rate // FRAMES_PER_SECOND
        self._rest = np.zeros(0, np.float32)  # the last sample of the frames so far and more
        self._power = np.zeros(0, np.float32)  # (M,)

    def add(self, chunk: Waveform) -> None:
        """A chunk (N,) that follows what was heard."""
        if not len(self._rest):
            self._rest = chunk[:1]
        samples = np.concatenate([self._rest, chunk])
        count = (len(samples) - 1) // self._hop
        used, self._rest = samples[: count * self._hop + 1], samples[count * self._hop :]
        frames = (used[1:] - np.float32(PREEMPHASIS) * used[:-1]).reshape(count, self._hop)
        power = np.einsum("ij,ij->i", frames, frames) / self._hop - frames.mean(axis=1) ** 2
        self._power = np.concatenate([self._power, power])[-MEMORY:]

    def decibels(self) -> Array:
        """The smoothed levels (M,) in dB."""
        width = min(SMOOTH, len(self._power))
        if not width:
            return self._power
        smooth = np.convolve(self._power, np.full(width, 1 / width), mode="same")
        return (10 * np.log10(np.maximum(smooth, 0) + ZERO)).astype(np.float32)


def threshold(levels: Array) -> float:
    """The level in dB above which frames among `levels` (M,) are taken for speech."""
    rank, tenth = min(RANK, len(levels) // 10), len(levels) // 10
    last = len(levels) - 1 - rank
    ordered = np.partition(levels, sorted({rank, tenth, last}))
    least, quiet, peak = ordered[rank], ordered[tenth], ordered[last]
    if peak - least < STEADY:
        return np.inf
    return float(max(min(quiet + ABOVE_FLOOR, peak - BELOW_PEAK), peak - RANGE))
