"""Log-mel features in NeMo's convention, in NumPy; training and the edge use this same code.

Pre-emphasis, centred frames padded with zeros, symmetric Hann window, power spectrum, Slaney mel
filters, log(x + 2**-24), then per-feature mean and variance over the utterance. Source: NeMo's
`FilterbankFeatures`; checked against librosa in tests/test_features.py. NeMo up to 2.4 mirrored
the waveform at its ends, later versions leave out the last frame; streaming models do not
normalise, or by a fixed mean and deviation: all of these are fields of `FeatureConfig`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from asr.runtime.config import FeatureConfig

Array = npt.NDArray[np.float32]

LOG_GUARD = 2.0**-24
STD_GUARD = 1e-5
BLOCK = 512  # frames that are transformed together: what a processor's cache holds


def n_frames(n_samples: int, config: FeatureConfig) -> int:
    """Frames of an utterance of `n_samples`: one every hop, the first centred on sample 0."""
    return n_samples // config.hop_length + config.last_frame


def subsampled_length(length: Any, factor: int) -> Any:
    """Frames left of `length` (an int, array or tensor) after log2(factor) stride-2 convolutions.

    Each rounds up.
    """
    while factor > 1:
        length = (length + 1) // 2
        factor //= 2
    return length


def log_mel(waveform: Array, config: FeatureConfig | None = None) -> Array:
    """Normalised features (T, n_mels) of a mono waveform (N,) at `config.sample_rate`."""
    config = config or FeatureConfig()
    return normalize(raw_log_mel(waveform, config), config)


def raw_log_mel(waveform: Array, config: FeatureConfig | None = None) -> Array:
    """Log-mel energies (T, n_mels) before normalisation, T = `n_frames(N)`."""
    config = config or FeatureConfig()
    x = np.asarray(waveform, dtype=np.float32)
    emphasised = np.empty(len(x) + config.n_fft, np.float32)  # n_fft // 2 zeros on either side
    half = config.n_fft // 2
    emphasised[:half] = emphasised[half + len(x) :] = 0.0
    emphasised[half] = x[0] if len(x) else 0.0
    np.subtract(x[1:], config.preemphasis * x[:-1], out=emphasised[half + 1 : half + len(x)])
    if config.padding == "reflect" and len(x) > 1:
        emphasised = np.pad(emphasised[half : half + len(x)], half, mode="reflect")
    first = (config.n_fft - config.win_length) // 2  # the window lies in the middle
    frames = np.lib.stride_tricks.sliding_window_view(emphasised[first:], config.win_length)
    frames = frames[:: config.hop_length][: n_frames(len(x), config)]  # (T, win_length), a view
    filters = mel_filters(config).T
    mel = np.empty((len(frames), config.n_mels), np.float32)
    for start in range(0, len(frames), BLOCK):
        block = slice(start, start + BLOCK)
        np.matmul(power_spectrum(frames[block], config), filters, out=mel[block])
    mel += np.float32(LOG_GUARD)
    log: Array = np.log(mel, out=mel)
    return log


def power_spectrum(frames: Array, config: FeatureConfig) -> Array:
    """Powers (T, n_fft // 2 + 1) of frames (T, win_length), windowed and transformed by products.

    About the middle of a frame its even part has the real and its odd part the imaginary
    coefficients; the phase that this leaves out has no power. A product of matrices is several
    times faster here than NumPy's FFT.
    """
    cosines, sines = _transform(config)
    after: Any = frames[:, -len(cosines) :]
    before: Any = frames[:, len(cosines) - 1 :: -1]
    real: Array = (after + before) @ cosines
    imaginary: Array = (after - before) @ sines
    real *= real
    imaginary *= imaginary
    real += imaginary
    return real


def normalize(features: Array, config: FeatureConfig) -> Array:
    """Features (T, n_mels) as `config.normalization` says.

    "per_feature": zero mean and unit (unbiased) variance of every mel bin over time; "fixed": less
    `mean`, by `std`; "none": as they are.
    """
    if len(features) == 0 or config.normalization == "none":
        return features
    if config.normalization == "fixed":
        return (features - np.array(config.mean, "f4")) / np.array(config.std, "f4")
    mean = features.mean(axis=0, dtype=np.float64)
    std = np.sqrt(((features - mean) ** 2).sum(axis=0) / max(len(features) - 1, 1))
    return ((features - mean) / (std + STD_GUARD)).astype(np.float32)


@lru_cache(maxsize=8)
def _transform(config: FeatureConfig) -> tuple[Array, Array]:
    """Cosines and sines (ceil(win_length / 2), n_fft // 2 + 1) under half a symmetric Hann window.

    Rows go from the middle outwards; a sample in the middle itself is met twice, so it counts half.
    """
    half = (config.win_length + 1) // 2
    window = np.hanning(config.win_length)[-half:]
    if config.win_length % 2:
        window[0] /= 2
    distance = np.arange(half) + (config.win_length - 1) / 2 % 1
    bins = np.arange(config.n_fft // 2 + 1) * (2 * np.pi / config.n_fft)
    angle = distance[:, None] * bins
    cosines, sines = window[:, None] * np.cos(angle), window[:, None] * np.sin(angle)
    return cosines.astype(np.float32), sines.astype(np.float32)


@lru_cache(maxsize=8)
def mel_filters(config: FeatureConfig) -> Array:
    """Triangular filters (n_mels, n_fft // 2 + 1) on Slaney's mel scale, of equal area."""
    top = _hz_to_mel(np.array(config.sample_rate / 2))
    edges = _mel_to_hz(np.linspace(0.0, float(top), config.n_mels + 2))  # (n_mels + 2,) Hz
    bins = np.linspace(0, config.sample_rate / 2, config.n_fft // 2 + 1)
    width = np.diff(edges)
    ramps = edges[:, None] - bins[None, :]
    rising, falling = -ramps[:-2] / width[:-1, None], ramps[2:] / width[1:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return (triangles * (2.0 / (edges[2:] - edges[:-2]))[:, None]).astype(np.float32)


# Slaney's Auditory Toolbox scale: linear below 1 kHz (200/3 Hz a mel), logarithmic above.
_LINEAR_STEP, _KNEE_HZ, _LOG_STEP = 200.0 / 3, 1000.0, np.log(6.4) / 27.0
_KNEE_MEL = _KNEE_HZ / _LINEAR_STEP


def _hz_to_mel(hz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    log_part = _KNEE_MEL + np.log(np.maximum(hz, 1e-9) / _KNEE_HZ) / _LOG_STEP
    return np.where(hz < _KNEE_HZ, hz / _LINEAR_STEP, log_part)


def _mel_to_hz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    log_part = _KNEE_HZ * np.exp(_LOG_STEP * (mel - _KNEE_MEL))
    return np.where(mel < _KNEE_MEL, mel * _LINEAR_STEP, log_part)
