"""Making recordings alike that differ in level, offset and hum, as features see them.

The features take a logarithm of energies plus a small constant, so that quiet speech sinks into it.
What is loud enough comes back as it is: training saw it so.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Waveform = npt.NDArray[np.float32]

QUIET = 0.1  # a peak below this (-20 dBFS) is raised to it
FRAME = 160  # samples whose peak is looked at
RANK = 4  # frames that may be louder than the peak that counts: clicks
ABOVE = 4.0  # times that peak: a stray sample
HUM = 0.08  # of that peak: the strength of an offset or a line of hum that is taken away
PERIODS = (50, 20)  # a second: of 50 Hz and its harmonics; of 60 Hz and its harmonics


def robust_peak(waveform: Waveform) -> float:
    """The largest absolute value of a waveform (N,), but for a few frames of `FRAME` samples."""
    count = len(waveform) // FRAME
    if count <= 4 * RANK:
        return float(np.abs(waveform).max()) if len(waveform) else 0.0
    frames = waveform[: count * FRAME].reshape(count, FRAME)
    peaks = np.maximum(frames.max(axis=1), -frames.min(axis=1))
    return float(np.partition(peaks, count - 1 - RANK)[count - 1 - RANK])


def without_strays(waveform: Waveform) -> Waveform:
    """The waveform (N,) with single samples far above all others taken away."""
    peak = max(float(waveform.max()), -float(waveform.min())) if len(waveform) else 0.0
    most = ABOVE * robust_peak(waveform)
    return np.where(np.abs(waveform) > most, 0, waveform) if peak > most > 0 else waveform


def without_hum(waveform: Waveform, sample_rate: int) -> Waveform:
    """The waveform (N,) without a constant offset and the mains' hum, where there is much of it.

    Both repeat with the mains' period, so that they are the mean of the periods; speech is not.
    """
    peak = robust_peak(waveform)
    for length in (sample_rate // rate for rate in PERIODS):
        count = len(waveform) // length
        if not count:
            break
        mean = waveform[: count * length].reshape(count, length).mean(axis=0)  # (length,)
        lines = np.fft.rfft(mean)
        strong = np.abs(lines) * 2 / length > HUM * peak
        if strong.any():
            hum = np.fft.irfft(np.where(strong, lines, 0), length).astype(np.float32)
            waveform = waveform - np.resize(hum, len(waveform))
    return waveform


def settle_level(waveform: Waveform, sample_rate: int) -> Waveform:
    """A waveform (N,) without strays, offset and hum, its peak between QUIET and 1."""
    waveform = without_hum(without_strays(waveform), sample_rate)
    peak = max(float(waveform.max()), -float(waveform.min()))
    wanted = min(max(peak, QUIET), 1.0)
    return waveform if wanted == peak or not peak else waveform * np.float32(wanted / peak)
