"""Augmentation in NumPy: time, rooms and recorders on the waveform, warp and masks on features.

Every function takes a `numpy.random.Generator` seeded by (seed, epoch, utterance), so that a run
that resumes, or uses other worker counts, sees the same audio.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import soxr

from asr.training import rooms

Array = npt.NDArray[np.float32]
Voices = Callable[[np.random.Generator], list[Array]]


@dataclass(frozen=True)
class AugmentConfig:
    """Strengths; zero switches a kind off. From `silence` to `codec`: shares of the utterances."""

    shift: int = 160  # samples; up to so many are cut from the start, a hop at 16 kHz
    speed: float = 0.1  # speed factor 1 - speed, 1 or 1 + speed
    warp: float = 0.1  # vocal-tract warp of the mel axis, up to this share
    gain: float = 6.0  # dB up or down
    silence: float = 0.0  # up to 2 s of a quiet room before, and as much after
    reverb: float = 0.0  # a room around the speaker
    babble: float = 0.0  # other speakers of the training set, 5 to 20 dB below
    noise: float = 0.0  # coloured noise, 5 to 30 dB below
    clip: float = 0.0  # peaks cut off
    telephone: float = 0.0  # 8 kHz, mu-law or A-law
    codec: float = 0.0  # MP3 or Opus at low bitrates
    level: float = 0.0  # speech between -50 and -10 dBFS, rounded to 16 bits
    time_masks: int = 5  # SpecAugment (Park et al. 2019)
    time_mask: float = 0.05  # longest time mask, as a share of the utterance
    freq_masks: int = 2
    freq_mask: int = 27  # widest frequency mask, mel bins


SILENCE = 2.0  # seconds, the longest silence before or after


@dataclass(frozen=True)
class Timing:
    """How an utterance's time changes: its speed, and seconds of silence around it."""

    speed: float = 1.0
    before: float = 0.0
    after: float = 0.0

    def duration(self, seconds: float) -> float:
        return seconds / self.speed + self.before + self.after


def timing(rng: np.random.Generator, config: AugmentConfig) -> Timing:
    """Drawn first of all, so that batches can be made by length before any audio is read.

    Speed is a factor by which an utterance is played faster (Ko et al. 2015).
    """
    speeds = [1 - config.speed, 1.0, 1 + config.speed]
    speed = float(rng.choice(speeds)) if config.speed else 1.0
    if not (config.silence and rng.random() < config.silence):
        return Timing(speed)
    return Timing(speed, *(SILENCE * rng.random(2) ** 2))


def retime(waveform: Array, time: Timing, rng: np.random.Generator, shift: int) -> Array:
    """Shift, speed and silence on a waveform (N,).

    The shift moves the frames over the speech: other toolkits lay theirs half a hop from ours.
    """
    if shift:
        waveform = waveform[int(rng.integers(0, shift)) :]
    if time.speed != 1.0:
        waveform = soxr.resample(waveform, time.speed, 1.0, quality="LQ").astype(np.float32)
    if not (time.before or time.after):
        return waveform
    around = [int(seconds * rooms.SAMPLE_RATE) for seconds in (time.before, time.after)]
    hiss = rooms.coloured_noise(len(waveform) + sum(around), rng)
    return rooms.add_noise(np.pad(waveform, around), hiss, rng.uniform(30, 70))


def degrade(
    waveform: Array, rng: np.random.Generator, config: AugmentConfig, voices: Voices | None = None
) -> Array:
    """What room, noise, recorder and telephone do to a waveform (N,); the length stays.

    `voices(rng)` gives other recordings for the babble.
    """

    def draw(share: float) -> bool:
        return share > 0 and rng.random() < share

    if draw(config.reverb):
        waveform = rooms.reverberate(waveform, rng)
    if draw(config.babble) and voices:
        crowd = rooms.babble(voices(rng), len(waveform), rng)
        waveform = rooms.add_noise(waveform, crowd, rng.uniform(5, 20))
    if draw(config.noise):
        hiss = rooms.coloured_noise(len(waveform), rng)
        waveform = rooms.add_noise(waveform, hiss, rng.uniform(5, 30))
    if draw(config.clip):
        waveform = rooms.clip(waveform, rng)
    if draw(config.telephone):
        waveform = rooms.telephone(waveform, rng)
    if draw(config.codec):
        waveform = rooms.low_bitrate(waveform, rng)
    if draw(config.level):
        return rooms.to_level(waveform, rng.uniform(-50, -10))
    if config.gain:
        waveform = waveform * np.float32(10 ** (rng.uniform(-config.gain, config.gain) / 20))
    return waveform


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
