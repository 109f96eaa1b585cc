"""Reading audio: any common file or array to a float32 mono waveform in [-1, 1].

Whatever a file holds (8 to 32 bit integers, floats, several channels, another sample rate) ends as
one `(N,)` float32 array at the rate asked for. Channels are averaged. A peak above 1 (float files,
lossy decoders, resampling) is scaled back to 1 rather than clipped, which keeps the shape of the
wave. What cannot be trusted is refused with an `AudioError`: one line that says what is wrong,
where, and what to do.
"""

from __future__ import annotations

import io
import math
import os
import stat
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from asr.runtime.containers import find_problem

SAMPLE_RATE = 16000
EXTENSIONS = (".flac", ".wav", ".opus", ".ogg", ".mp3")

MIN_RATE, MAX_RATE = 4000, 768_000  # Hz; outside, a header is taken for damaged
MAX_CHANNELS = 8  # of an array; more look like a batch of waveforms
BLOCK = 1 << 22  # frames read at once: longer files are read piece by piece to save memory
UNKNOWN_FRAMES = 1 << 48  # libsndfile reports at least this for a FLAC without a length
AGAIN = "copy or download it again, or re-encode what is there"

Waveform = npt.NDArray[np.float32]


class AudioError(ValueError):
    """Audio that cannot be used; the message is one line for the user."""


class _HeldFile(io.BytesIO):
    """What an open file holds; as text it is the file's name."""

    def __init__(self, file: IO[bytes]) -> None:
        self._name = name_of(file)
        contents = file.read()
        if not isinstance(contents, bytes):
            raise AudioError(f"{self._name}: opened as text; open it with mode 'rb'")
        super().__init__(contents)

    def __str__(self) -> str:
        return self._name


def name_of(source: Any) -> str:
    """A path or the name of an open file, for a message."""
    if isinstance(source, str | Path):
        return str(source)
    return str(getattr(source, "name", "the open file"))


def read_audio(source: str | Path | IO[bytes], sample_rate: int = SAMPLE_RATE) -> Waveform:
    """Read a WAV, FLAC, Ogg (Opus, Vorbis) or MP3 file as mono at `sample_rate` Hz.

    An open binary file is read from where it is to its end; it need not seek.

    Returns `(N,)` float32 in [-1, 1]. Raises AudioError for a file that is missing, empty, without
    samples, truncated or not audio, and for NaN or infinite samples.
    """
    path = source if isinstance(source, str | Path) else _HeldFile(source)
    check_file(path)
    with _open(path) as file:
        known = 0 < file.frames <= BLOCK
        try:
            pieces = [file.read(dtype="float32")] if known else _read_pieces(file, sample_rate)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise AudioError(_damaged(path, error)) from None
        if known:
            _check_count(file, len(pieces[0]))
        rate = file.samplerate if known else sample_rate
    waveform = pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.zeros(0, "f4")])
    if not waveform.size:
        raise AudioError(f"{path}: holds no samples; record or export it again")
    return _finish(waveform, rate, sample_rate, str(path))


def check_waveform(
    waveform: npt.ArrayLike, sample_rate: int = SAMPLE_RATE, target_rate: int = SAMPLE_RATE
) -> Waveform:
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
    return _finish(_to_float(samples, where), sample_rate, target_rate, where)


def audio_duration(path: str | Path) -> float:
    """Seconds of audio by the file's header, without decoding; raises AudioError as `read_audio`.

    Damage inside the compressed samples is only found by `read_audio`.
    """
    check_file(path)
    with _open(path) as file:
        frames, rate = int(file.frames), int(file.samplerate)
    if frames == 0:
        raise AudioError(f"{path}: holds no samples; record or export it again")
    return frames / rate


def limit_peak(waveform: Waveform) -> Waveform:
    """Scale a waveform whose peak is above 1 back to a peak of 1; others come back as they are."""
    peak = _peak(waveform)
    return waveform / np.float32(peak) if peak > 1 else waveform


def check_file(path: str | Path | _HeldFile) -> None:
    """Raise AudioError if `path` is missing, empty or, by its container, truncated."""
    if isinstance(path, _HeldFile):
        size = path.getbuffer().nbytes
        problem = find_problem(path, size, str(path)) if size else "holds nothing"
        path.seek(0)
        if problem:
            raise AudioError(f"{path}: {problem}; {AGAIN}")
        return
    try:
        with open(path, "rb", buffering=0) as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise AudioError(f"{path}: not a regular file; save the audio to a file first")
            if info.st_size == 0:
                raise AudioError(f"{path}: the file is empty; record or download it again")
            problem = find_problem(file, info.st_size, os.fspath(path))
    except FileNotFoundError:
        raise AudioError(f"{path}: no such audio file; check the path") from None
    except IsADirectoryError:
        raise AudioError(f"{path}: a folder, not an audio file; name a file in it") from None
    except (OSError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise AudioError(f"{path}: cannot be read ({reason}); check the file") from None
    if problem:
        raise AudioError(f"{path}: {problem}; {AGAIN}")


def _open(path: str | Path | _HeldFile) -> Any:
    """An open SoundFile whose header makes sense."""
    try:
        file = soundfile.SoundFile(path if isinstance(path, _HeldFile) else os.fspath(path))
    except (soundfile.LibsndfileError, TypeError, RuntimeError) as error:
        raise AudioError(_damaged(path, error)) from None
    if file.frames > UNKNOWN_FRAMES:
        file.close()
        raise AudioError(f"{path}: the header gives no length (written to a pipe); encode it again")
    if MIN_RATE <= file.samplerate <= MAX_RATE:
        return file
    file.close()
    raise AudioError(
        f"{path}: a sample rate of {file.samplerate} Hz is not one of speech; convert the file"
    )


def _read_pieces(file: Any, sample_rate: int) -> list[Waveform]:
    """A long file, or one of unknown length, down-mixed and resampled piece by piece."""
    resample = None
    if file.samplerate != sample_rate:
        resample = soxr.ResampleStream(file.samplerate, sample_rate, 1, dtype="float32")
    pieces: list[Waveform] = []
    done = 0
    while True:
        block = file.buffer_read(BLOCK, dtype="float32")
        samples = np.frombuffer(block, dtype=np.float32).reshape(-1, file.channels)
        last = len(samples) < BLOCK
        done += len(samples)
        piece = _to_mono(samples)
        if len(piece):
            _check_finite(piece, file.name)
        pieces.append(resample.resample_chunk(piece, last=last) if resample else piece)
        if last:
            break
    _check_count(file, done)
    return pieces


def _check_count(file: Any, count: int) -> None:
    """MP3 is exempt: without a Xing header (checked before) its length is only estimated."""
    if count < file.frames and file.format != "MP3":
        raise AudioError(f"{file.name}: truncated ({count} of {file.frames} samples); {AGAIN}")


def _finish(samples: npt.NDArray[Any], rate: int, target_rate: int, where: str) -> Waveform:
    """Check, down-mix, resample and limit `(N,)` or `(N, channels)` float32 samples."""
    if not MIN_RATE <= rate <= MAX_RATE or not MIN_RATE <= target_rate <= MAX_RATE:
        wrong = target_rate if MIN_RATE <= rate <= MAX_RATE else rate
        raise AudioError(
            f"{where}: a sample rate of {wrong} Hz is not usable ({MIN_RATE} to {MAX_RATE} are)"
        )
    waveform = _to_mono(samples)
    if _check_finite(waveform, where) > 1:
        waveform = limit_peak(waveform)
    if rate != target_rate:
        waveform = soxr.resample(waveform, rate, target_rate, quality="HQ")
        if not waveform.size:
            raise AudioError(f"{where}: too short to resample ({len(samples)} samples)")
        waveform = limit_peak(waveform)
    return np.ascontiguousarray(waveform, dtype=np.float32)


def _to_mono(samples: npt.NDArray[Any]) -> Waveform:
    if samples.ndim == 1:
        return samples
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)


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


def _check_finite(waveform: Waveform, where: str) -> float:
    peak = _peak(waveform)
    if math.isfinite(peak):
        return peak
    bad = ~np.isfinite(waveform)
    raise AudioError(
        f"{where}: {int(bad.sum())} samples are NaN or infinite, the first at sample "
        f"{int(bad.argmax())}; export the audio again"
    )


def _damaged(path: str | Path | _HeldFile, error: Exception) -> str:
    detail = getattr(error, "error_string", "").strip().rstrip(".") or "unknown format"
    if "possibly a pipe" in detail:  # libsndfile says this of any MP3 it cannot decode
        detail = "no decodable stream"
    return (
        f"{path}: not audio, or damaged ({detail}); expected WAV, FLAC, Ogg (Opus, Vorbis) or MP3, "
        "so convert it, for example with ffmpeg -i IN OUT.wav"
    )
