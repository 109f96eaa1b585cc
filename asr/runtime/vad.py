"""Where somebody speaks: a detector that hears energies, alike at any level.

It looks at the waveform after pre-emphasis, which takes away a constant offset and most of a hum,
in frames of 10 ms. What counts is the distance from the quiet and from the loud frames around, so
that a recording at -60 dBFS is cut like the same one at 0 dBFS. It is made to lose nothing: doubt
counts as speech.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Waveform = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]  # (frames,): somebody speaks
Detector = Callable[[Waveform, int], Mask]  # of a waveform (N,) at a sample rate, N // hop frames

FRAMES_PER_SECOND = 100
PREEMPHASIS = 0.97
SMOOTH = 5  # frames that are averaged
AROUND = 30 * FRAMES_PER_SECOND  # frames on either side that tell what is quiet and what loud
ABOVE_FLOOR = 8.0  # dB over the quiet tenth of the frames: speech
BELOW_PEAK = 12.0  # dB under the loudest, or less: speech whatever the floor
RANGE = 60.0  # dB under the loudest, or more: silence whatever the floor
STEADY = 6.0  # dB from the quietest to the loudest: a sound that steady is no speech
RANK = 10  # frames louder than the loudest that counts, so that a click does not; quieter likewise
ZERO = 1e-14  # of a square: -140 dB, the floor of digital silence


def find_speech(waveform: Waveform, sample_rate: int) -> Mask:
    """Which frames of 10 ms of a mono waveform (N,) hold speech, (N // (sample_rate // 100),)."""
    levels = frame_levels(waveform, sample_rate)
    mask = np.zeros(len(levels), bool)
    for at in range(0, len(levels), AROUND):
        near = levels[max(0, at - AROUND) : at + 2 * AROUND]
        mask[at : at + AROUND] = levels[at : at + AROUND] > threshold(near)
    return mask


def frame_levels(waveform: Waveform, sample_rate: int) -> npt.NDArray[np.float32]:
    """Smoothed level in dB of every whole frame of 10 ms after pre-emphasis."""
    hop = sample_rate // FRAMES_PER_SECOND
    count = len(waveform) // hop
    if not count:
        return np.zeros(0, np.float32)
    used = waveform[: count * hop]
    emphasised = np.empty_like(used)
    emphasised[0] = 0
    np.subtract(used[1:], np.float32(PREEMPHASIS) * used[:-1], out=emphasised[1:])
    frames = emphasised.reshape(count, hop)
    power = np.einsum("ij,ij->i", frames, frames) / hop - frames.mean(axis=1) ** 2  # (count,)
    width = min(SMOOTH, count)
    smooth = np.convolve(power, np.full(width, 1 / width), mode="same")
    return (10 * np.log10(np.maximum(smooth, 0) + ZERO)).astype(np.float32)


def threshold(levels: npt.NDArray[np.float32]) -> float:
    """The level in dB above which frames among `levels` are taken for speech."""
    rank = min(RANK, len(levels) // 10)
    ordered = np.sort(levels)
    least, quiet, peak = ordered[rank], ordered[len(levels) // 10], ordered[-1 - rank]
    if peak - least < STEADY:
        return np.inf
    return float(max(min(quiet + ABOVE_FLOOR, peak - BELOW_PEAK), peak - RANGE))
