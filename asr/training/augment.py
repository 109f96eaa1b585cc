"""Augmentation in NumPy: shift, speed, noise and gain on the waveform, warp and masks on features.

Every function takes a `numpy.random.Generator` seeded by (seed, epoch, utterance), so that a run
that resumes, or uses other worker counts, sees the same audio.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import soxr

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class AugmentConfig:
    """Strengths; zero switches a kind off."""

    shift: int = 160  # samples; up to so many are cut from the start, a hop at 16 kHz
    speed: float = 0.1  # speed factor 1 - speed, 1 or 1 + speed
    warp: float = 0.1  # vocal-tract warp of the mel axis, up to this share
    noise: float = 0.0  # share of utterances that get coloured noise at 5 to 30 dB
    gain: float = 6.0  # dB up or down
    time_masks: int = 5  # SpecAugment (Park et al. 2019)
    time_mask: float = 0.05  # longest time mask, as a share of the utterance
    freq_masks: int = 2
    freq_mask: int = 27  # widest frequency mask, mel bins


def speed_factor(rng: np.random.Generator, config: AugmentConfig) -> float:
    """The factor by which an utterance is played faster (Ko et al. 2015)."""
    return float(rng.choice([1 - config.speed, 1.0, 1 + config.speed])) if config.speed else 1.0


def augment_waveform(
    waveform: Array, speed: float, rng: np.random.Generator, config: AugmentConfig
) -> Array:
    """Shift, speed, gain and noise on a waveform (N,); speed changes its length by 1 / speed.

    The shift moves the frames over the speech: other toolkits lay theirs half a hop from ours.
    """
    if config.shift:
        waveform = waveform[int(rng.integers(0, config.shift)) :]
    if speed != 1.0:
        waveform = soxr.resample(waveform, speed, 1.0, quality="LQ").astype(np.float32)
    if config.gain:
        waveform = waveform * np.float32(10 ** (rng.uniform(-config.gain, config.gain) / 20))
    if config.noise and rng.random() < config.noise:
        waveform = waveform + coloured_noise(waveform, rng.uniform(5, 30), rng)
    return waveform


def coloured_noise(waveform: Array, snr: float, rng: np.random.Generator) -> Array:
    """Noise between white and brown, `snr` dB below the waveform's mean power; shape (N,)."""
    n = len(waveform)
    spectrum = np.fft.rfft(rng.standard_normal(n, dtype=np.float32))
    colour = np.maximum(np.arange(len(spectrum)), 1.0) ** -rng.uniform(0, 1)
    noise = np.fft.irfft(spectrum * colour, n).astype(np.float32)  # power 1 / f**(0 .. 2)
    power = float(np.mean(waveform**2)) / max(float(np.mean(noise**2)), 1e-20)
    return noise * np.float32(np.sqrt(power * 10 ** (-snr / 10)))


def warp_frequency(features: Array, rng: np.random.Generator, config: AugmentConfig) -> Array:
    """Stretches the mel axis of (T, n_mels) by up to +-warp (Jaitly & Hinton 2013)."""
    if not config.warp:
        return features
    hundredths = round(100 * rng.uniform(-config.warp, config.warp))
    return features @ _warp_matrix(features.shape[1], hundredths)


@lru_cache(maxsize=64)
def _warp_matrix(n_mels: int, hundredths: int) -> Array:
    """(n_mels, n_mels): output bin j interpolates the input at j * (1 + hundredths / 100)."""
    source = np.minimum(np.arange(n_mels) * (1 + hundredths / 100), n_mels - 1)
    below = np.minimum(source.astype(int), n_mels - 2)
    matrix = np.zeros((n_mels, n_mels), np.float32)
    matrix[below, np.arange(n_mels)] = 1 - (source - below)
    matrix[below + 1, np.arange(n_mels)] = source - below
    return matrix


def spec_augment(features: Array, rng: np.random.Generator, config: AugmentConfig) -> Array:
    """Sets random time and frequency bands of (T, n_mels) to 0, the mean; in place."""
    n_frames, n_mels = features.shape
    for _ in range(config.freq_masks):
        width = int(rng.integers(0, config.freq_mask + 1))
        start = int(rng.integers(0, max(1, n_mels - width + 1)))
        features[:, start : start + width] = 0
    for _ in range(config.time_masks):
        width = int(rng.integers(0, int(config.time_mask * n_frames) + 1))
        start = int(rng.integers(0, max(1, n_frames - width + 1)))
        features[start : start + width] = 0
    return features
