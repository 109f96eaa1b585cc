"""Reading audio: any common file or array to a float32 mono waveform in [-1, 1].

Whatever a file holds (8 to 32 bit integers, floats, several channels, another sample rate) ends as
one `(N,)` float32 array at the rate asked for. Channels are averaged. A peak above 1 (float files,
lossy decoders, resampling) is scaled back to 1 rather than clipped, which keeps the shape of the
wave. What cannot be trusted is refused with an `AudioError`: one line that says what is wrong,
where, and what to do.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from asr.runtime.claims import counts_less, find_missing
from asr.runtime.containers import Part, find_parts
from asr.runtime.level import without_strays
from asr.runtime.sources import AudioError, ffmpeg_frames, name_of, opened, wants_ffmpeg

SAMPLE_RATE = 16000
EXTENSIONS = (".flac", ".wav", ".opus", ".ogg", ".oga", ".mp3")

MIN_RATE, MAX_RATE = 4000, 768_000  # Hz; outside, a header is taken for damaged
MAX_CHANNELS = 8  # of an array; more look like a batch of waveforms
BLOCK = 1 << 20  # frames read at once
CANCELLED = 0.25  # of the power that a mean of unlike channels has: they cancel each other
UNKNOWN_FRAMES = 1 << 48  # libsndfile reports at least this for a FLAC without a length
CODED = 4096  # bytes: the last block of a codec may be left unread
SEEN = ("WAV", "WAVEX", "RF64", "MP3", "OGG", "AIFF", "CAF", "NIST")  # by `containers`
AGAIN = "copy or download it again, or re-encode what is there"

Waveform = npt.NDArray[np.float32]
Source = str | os.PathLike[str] | BinaryIO  # a path, "-" for standard input, or an open file


def read_audio(source: Source, sample_rate: int = SAMPLE_RATE) -> Waveform:
    """Read a WAV, FLAC, Ogg (Opus, Vorbis) or MP3 file as mono at `sample_rate` Hz.

    An open binary file is read from where it is to its end; it need not seek.

    Returns `(N,)` float32 in [-1, 1]. Raises AudioError for a file that is missing, empty, without
    samples, truncated or not audio, and for NaN or infinite samples.
    """
    blocks = list(read_blocks(source, sample_rate))
    waveform = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    return np.ascontiguousarray(limit_peak(waveform), dtype=np.float32)


def read_blocks(
    source: Source, sample_rate: int = SAMPLE_RATE, channel: int | None = None,
    incomplete: Callable[[str], None] | None = None,
) -> Iterator[Waveform]:  # fmt: skip
    """A recording of any length, mono `(n,)` float32 at `sample_rate` Hz, a minute or so at once.

    `source` is a path, "-" for standard input, or an open binary file. `channel` counts from 0;
    without it the channels are averaged, but the loudest is taken where they cancel each other.
    `incomplete` is called with a line about a file that holds less than its container says, and
    what is there is read; without it that is an AudioError like those of `read_audio`.
    """
    _check_rate(sample_rate, name_of(source))
    total = 0
    for rate, frames in _streams(source, incomplete or _refuse):
        done, resample = 0, None
        if rate != sample_rate:
            resample = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32")
        for samples in frames:
            mono = _to_mono(samples, channel, name_of(source))
            _check_finite(mono, name_of(source), done)
            done += len(mono)
            mono = without_strays(mono)
            block = resample.resample_chunk(mono) if resample else mono
            if len(block):
                yield block
            total += len(block)
        if resample and len(block := resample.resample_chunk(np.zeros(0, np.float32), last=True)):
            yield block
            total += len(block)
    if not total:
        raise AudioError(f"{name_of(source)}: holds no samples; record or export it again")


def check_waveform(
    waveform: npt.ArrayLike, sample_rate: int = SAMPLE_RATE, target_rate: int = SAMPLE_RATE,
    channel: int | None = None,
) -> Waveform:  # fmt: skip
    """Bring an array of samples at `sample_rate` Hz to what `read_audio` returns.

    Floats are taken as [-1, 1], integers by their full range (int64 as 16 bit if its values fit,
    else as 32 bit), uint8 as centred on 128. Two-dimensional arrays may be `(N, channels)` or
    `(channels, N)`: the shorter axis, at most 8, is the channels. Raises AudioError.
    """
    samples = np.asarray(waveform)
    where = f"waveform of shape {samples.shape} and type {samples.dtype}"
    if samples.ndim not in (1, 2):
        raise AudioError(f"{where}: expected one axis, or two with the channels; pass one waveform")
    if not samples.size:
        raise AudioError(f"{where}: holds no samples; pass at least a tenth of a second of audio")
    if samples.ndim == 2:
        samples = samples.T if samples.shape[0] < samples.shape[1] else samples
        if samples.shape[1] > MAX_CHANNELS:
            raise AudioError(f"{where}: more than {MAX_CHANNELS} channels; pass one waveform each")
    return _finish(_to_float(samples, where), sample_rate, target_rate, where, channel)


def audio_duration(path: str | Path) -> float:
    """Seconds of audio by the file's header, without decoding; raises AudioError as `read_audio`.

    Damage inside the compressed samples is only found by `read_audio`.
    """
    seconds = 0.0
    with opened(path) as file:
        for part in _parts(file, path, _refuse):
            with _open(part, path) as sound:
                seconds += sound.frames / sound.samplerate
    if not seconds:
        raise AudioError(f"{name_of(path)}: holds no samples; record or export it again")
    return seconds


def count_channels(source: Source) -> int:
    """How many channels a file has; raises AudioError as `read_audio`."""
    for _, frames in _streams(source, lambda problem: None):
        return next(frames).shape[1]
    raise AudioError(f"{name_of(source)}: holds no samples; record or export it again")


def limit_peak(waveform: Waveform) -> Waveform:
    """Scale a waveform whose peak is above 1 back to a peak of 1; others come back as they are."""
    peak = _peak(waveform)
    return waveform / np.float32(peak) if peak > 1 else waveform


def _refuse(problem: str) -> None:
    raise AudioError(f"{problem}; {AGAIN}")


def _streams(
    source: Source, incomplete: Callable[[str], None]
) -> Iterator[tuple[int, Iterator[npt.NDArray[np.float32]]]]:
    """Sample rate and blocks of samples (n, channels) of each of a file's parts."""
    with opened(source) as file:
        head = file.read(12)
        if wants_ffmpeg(source, head):
            blocks = ffmpeg_frames(source, BLOCK)  # type: ignore[arg-type]
            for rate, block in blocks:
                yield rate, (samples for samples in (block, *(b for _, b in blocks)))
            return
        for part in _parts(file, source, incomplete):
            with _open(part, source) as sound:
                if sound.format not in SEEN and (problem := find_missing(sound)):
                    incomplete(f"{name_of(source)}: {problem}")
                yield sound.samplerate, _decode(sound, part, name_of(source), incomplete)


def _parts(file: BinaryIO, source: Source, incomplete: Callable[[str], None]) -> Iterator[Any]:
    """What soundfile opens for each of a file's parts."""
    name = name_of(source)
    size = file.seek(0, os.SEEK_END)
    if not size:
        raise AudioError(f"{name}: the file is empty; record or download it again")
    spans, problem = find_parts(file, size, name)
    if problem and spans:
        incomplete(f"{name}: {problem}")
    elif problem:
        _refuse(f"{name}: {problem}")
    for span in spans:
        file.seek(0)
        whole = (span.start, span.stop, span.patches) == (0, size, ())
        yield file if whole else Part(file, span)


def _open(part: Any, source: Source) -> Any:
    """An open SoundFile whose header makes sense."""
    name = name_of(source)
    try:
        sound = soundfile.SoundFile(part)
    except (soundfile.LibsndfileError, TypeError, RuntimeError) as error:
        raise AudioError(_damaged(name, error)) from None
    if sound.frames > UNKNOWN_FRAMES:
        sound.close()
        raise AudioError(f"{name}: the header gives no length (written to a pipe); encode it again")
    try:
        _check_rate(sound.samplerate, name)
    except AudioError:
        sound.close()
        raise
    return sound


def _decode(
    sound: Any, part: Any, name: str, incomplete: Callable[[str], None]
) -> Iterator[npt.NDArray[np.float32]]:
    """Blocks of samples (n, channels) of the file `part` that `sound` has opened.

    MP3 without a Xing header has only a guess of a length.
    """
    done = 0
    while True:
        try:
            samples = sound.read(BLOCK, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            if not done:
                raise AudioError(_damaged(name, error)) from None
            incomplete(_damaged(name, error))
            return
        if not len(samples):
            break
        done += len(samples)
        yield samples
    if done < sound.frames and sound.format != "MP3":
        incomplete(f"{name}: truncated ({done} of {sound.frames} samples)")
    elif getattr(part, "mended", False) or (sound.format not in SEEN and counts_less(sound)):
        place = part.tell()
        if (unread := part.seek(0, os.SEEK_END) - place) > CODED:
            incomplete(f"{name}: damaged ({unread} bytes behind what its header counts are lost)")


def _check_rate(rate: int, where: str) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(
            f"{where}: a sample rate of {rate} Hz is not usable ({MIN_RATE} to {MAX_RATE} are)"
        )


def _finish(
    samples: npt.NDArray[Any], rate: int, target_rate: int, where: str, channel: int | None
) -> Waveform:
    """Check, down-mix, resample and limit `(N,)` or `(N, channels)` float32 samples."""
    _check_rate(rate, where)
    _check_rate(target_rate, where)
    waveform = _to_mono(samples, channel, where)
    if _check_finite(waveform, where) > 1:
        waveform = limit_peak(without_strays(waveform))
    if rate != target_rate:
        waveform = soxr.resample(waveform, rate, target_rate, quality="HQ")
        if not waveform.size:
            raise AudioError(f"{where}: too short to resample ({len(samples)} samples)")
        waveform = limit_peak(waveform)
    return np.ascontiguousarray(waveform, dtype=np.float32)


def _to_mono(samples: npt.NDArray[Any], channel: int | None = None, where: str = "") -> Waveform:
    """One channel of (N, channels), their mean, or the loudest where the mean is near nothing."""
    if samples.ndim == 1:
        return samples
    count = samples.shape[1]
    if channel is not None:
        if channel >= count:
            raise AudioError(f"{where}: has no channel {channel + 1}, only {count}; name another")
        return np.ascontiguousarray(samples[:, channel])
    if count == 1:
        return samples[:, 0]
    mean: Waveform = samples.mean(axis=1, dtype=np.float32)
    powers = np.einsum("ij,ij->j", samples, samples)  # (channels,)
    if float(mean @ mean) < CANCELLED * float(powers.mean()) / count:
        return np.ascontiguousarray(samples[:, int(powers.argmax())])
    return mean


def _to_float(samples: npt.NDArray[Any], where: str) -> Waveform:
    if samples.dtype.kind == "f":
        with np.errstate(over="ignore"):  # a float64 too large becomes infinite and is refused
            return samples.astype(np.float32, copy=False)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - np.float32(128)) / np.float32(128)
    if samples.dtype.kind != "i":
        raise AudioError(f"{where}: expected floats in [-1, 1] or signed integers; convert it")
    bits = 8 * samples.dtype.itemsize
    if bits == 64:
        largest = max(int(samples.max()), -int(samples.min()))
        bits = 16 if largest <= 1 << 15 else 32
    return (samples / float(1 << (bits - 1))).astype(np.float32)


def _peak(samples: Waveform) -> float:
    """Largest absolute value; NaN if any sample is NaN. Faster than `abs().max()`."""
    return max(float(samples.max()), -float(samples.min()))


def _check_finite(waveform: Waveform, where: str, before: int = 0) -> float:
    peak = _peak(waveform)
    if math.isfinite(peak):
        return peak
    bad = ~np.isfinite(waveform)
    raise AudioError(
        f"{where}: {int(bad.sum())} samples are NaN or infinite, the first at sample "
        f"{before + int(bad.argmax())}; export the audio again"
    )


def _damaged(name: str, error: Exception) -> str:
    detail = getattr(error, "error_string", "").strip().rstrip(".") or "unknown format"
    if "possibly a pipe" in detail:  # libsndfile says this of any MP3 it cannot decode
        detail = "no decodable stream"
    return (
        f"{name}: not audio, or damaged ({detail}); expected WAV, FLAC, Ogg (Opus, Vorbis) or MP3, "
        "so convert it, for example with ffmpeg -i IN OUT.wav"
    )
