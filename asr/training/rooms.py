"""What rooms, recorders and telephones do to speech, in NumPy: (N,) float32 at 16 kHz to the same.

Rooms by the image-source method (Allen & Berkley 1979), companding as in ITU-T G.711, telephone
band as in G.712. Every function takes a `numpy.random.Generator`.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

Array = npt.NDArray[np.float32]
Place = npt.NDArray[np.float64]

SAMPLE_RATE = 16000
SOUND_SPEED = 343.0  # m/s
IMAGES = 5  # reflections followed along each axis, to either side


def room_response(
    size: Place, source: Place, microphone: Place, absorption: float, rate: int = SAMPLE_RATE
) -> Array:
    """Impulse response of a shoebox room of `size` (3,) metres whose walls absorb that share.

    Images up to IMAGES rooms away; the response begins with the direct sound, of height 1.
    """
    cells, parity = _images()
    images = (1 - 2 * parity) * source + 2 * cells * size  # (n, 3)
    distance = np.maximum(np.linalg.norm(images - microphone, axis=1), 0.1)
    bounces = np.abs(cells - parity).sum(axis=1) + np.abs(cells).sum(axis=1)
    height = (1 - absorption) ** (bounces / 2) / distance
    delay = np.round((distance - distance.min()) / SOUND_SPEED * rate).astype(int)
    response = np.bincount(delay, height)
    return (response / response[0]).astype(np.float32)


@lru_cache(maxsize=1)
def _images() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Which room and which mirroring along each axis, (n, 3) each."""
    axis = np.arange(-IMAGES, IMAGES + 1)
    grid = np.meshgrid(axis, axis, axis, [0, 1], [0, 1], [0, 1], indexing="ij")
    flat = np.stack([g.ravel() for g in grid], axis=1)
    return flat[:, :3], flat[:, 3:]


def reverberate(waveform: Array, rng: np.random.Generator) -> Array:
    """The waveform as heard in a random room, at the same mean power."""
    size = rng.uniform([2.5, 2.5, 2.3], [8.0, 6.0, 3.5])
    source, microphone = (size * rng.uniform(0.1, 0.9, 3) for _ in range(2))
    response = room_response(size, source, microphone, float(rng.uniform(0.2, 0.8)))
    n = len(waveform) + len(response) - 1
    width = 1 << (n - 1).bit_length()
    heard = np.fft.irfft(np.fft.rfft(waveform, width) * np.fft.rfft(response, width), width)
    return scale_to(heard[: len(waveform)].astype(np.float32), _power(waveform))


def add_noise(waveform: Array, noise: Array, snr: float) -> Array:
    """The waveform with `noise` (N,) at `snr` dB below the mean power of what is spoken."""
    return waveform + scale_to(noise, speech_power(waveform) * 10 ** (-snr / 10))


def coloured_noise(n: int, rng: np.random.Generator) -> Array:
    """Noise (n,) between white and brown: power 1 / f**(0 .. 2)."""
    size = 1 << max(n - 1, 1).bit_length()
    spectrum = np.fft.rfft(rng.standard_normal(size, dtype=np.float32))
    colour = np.maximum(np.arange(len(spectrum)), 1.0) ** -rng.uniform(0, 1)
    return np.fft.irfft(spectrum * colour, size)[:n].astype(np.float32)


def babble(voices: list[Array], n: int, rng: np.random.Generator) -> Array:
    """Several voices at once (n,), each of the same power and begun somewhere in the middle."""
    total = np.zeros(n, np.float32)
    for voice in voices:
        turned = np.roll(voice, int(rng.integers(len(voice))))
        total += np.resize(scale_to(turned, 1.0), n)
    return total


def clip(waveform: Array, rng: np.random.Generator) -> Array:
    """Cuts off the peaks: the loudest 0.1 to 2 % of the samples."""
    limit = float(np.quantile(np.abs(waveform), 1 - 10 ** rng.uniform(-3, -1.7)))
    return np.clip(waveform, -limit, limit)


def telephone(waveform: Array, rng: np.random.Generator) -> Array:
    """300 to 3,400 Hz at 8 kHz in 8 bits, by mu-law or A-law."""
    narrow = soxr.resample(waveform, SAMPLE_RATE, 8000, quality="LQ").astype(np.float32)
    spectrum = np.fft.rfft(narrow)
    hertz = np.arange(len(spectrum)) * (8000 / max(len(narrow), 1))
    spectrum[(hertz < rng.uniform(50, 300)) | (hertz > rng.uniform(3300, 3900))] = 0
    narrow = np.fft.irfft(spectrum, len(narrow)).astype(np.float32)
    peak = max(float(np.abs(narrow).max(initial=0)), 1e-9)
    narrow = (narrow / max(peak, 1.0)).astype(np.float32)
    narrow = mu_law(narrow) if rng.random() < 0.5 else a_law(narrow)
    wide = soxr.resample(narrow, 8000, SAMPLE_RATE, quality="LQ").astype(np.float32)
    return np.resize(np.pad(wide, (0, max(0, len(waveform) - len(wide)))), len(waveform))


def mu_law(x: Array) -> Array:
    """Values in [-1, 1] after 8-bit mu-law companding and back."""
    step = np.round(np.sign(x) * np.log1p(255 * np.abs(x)) / np.log(256) * 127) / 127
    return (np.sign(step) * np.expm1(np.abs(step) * np.log(256)) / 255).astype(np.float32)


def a_law(x: Array) -> Array:
    """Values in [-1, 1] after 8-bit A-law companding and back."""
    a, knee = 87.6, 1 / 87.6
    whole, size = 1 + np.log(a), np.abs(x)
    small = size < knee
    pressed = np.where(small, a * size, 1 + np.log(a * np.maximum(size, knee))) / whole
    pressed = np.round(pressed * 127) / 127 * whole
    return (np.sign(x) * np.where(pressed < 1, pressed, np.exp(pressed - 1)) / a).astype(np.float32)


def low_bitrate(waveform: Array, rng: np.random.Generator) -> Array:
    """Through MP3 or Ogg Opus at their strongest compression."""
    kind: dict[str, str] = [
        {"format": "MP3", "subtype": "MPEG_LAYER_III"}, {"format": "OGG", "subtype": "OPUS"},
    ][int(rng.integers(2))]  # fmt: skip
    buffer = io.BytesIO()
    level = float(rng.uniform(0.7, 1.0))
    soundfile.write(buffer, waveform, SAMPLE_RATE, compression_level=level, **kind)
    buffer.seek(0)
    heard, _ = soundfile.read(buffer, dtype="float32")
    return np.resize(np.pad(heard, (0, max(0, len(waveform) - len(heard)))), len(waveform))


def to_level(waveform: Array, decibels: float) -> Array:
    """Speech at that level below full scale, rounded to 16 bits as a recorder does."""
    loud = scale_to(waveform, 10 ** (decibels / 10), speech_power(waveform))
    return (np.round(np.clip(loud, -1, 1) * 32767) / 32767).astype(np.float32)


def scale_to(waveform: Array, power: float, of: float = 0.0) -> Array:
    """The waveform scaled so that its mean power (or `of`, if given) becomes `power`."""
    return waveform * np.float32(np.sqrt(power / max(of or _power(waveform), 1e-12)))


def speech_power(waveform: Array) -> float:
    """Mean power of the louder half of its frames of 20 ms: silence around does not count."""
    n = len(waveform) // 320
    if n < 2:
        return _power(waveform)
    frames = np.sort(np.square(waveform[: n * 320].reshape(n, 320)).mean(axis=1))
    return float(frames[n // 2 :].mean())


def _power(waveform: Array) -> float:
    return float(np.mean(np.square(waveform))) if len(waveform) else 0.0
