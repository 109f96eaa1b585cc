"""Opening what a user names: files, pipes, standard input, open files; and what ffmpeg reads.

What cannot seek is copied into a temporary file first, so that the rest sees only files that can.
"""

from __future__ import annotations

import io
import os
import re
import select
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from asr.runtime.files import printable

PATIENCE = 30.0  # seconds that a pipe may stay silent
COPIED = 1 << 16  # bytes that are copied at once
IN_MEMORY = 1 << 24  # bytes of a pipe that are kept in memory rather than in a file
FFMPEG_EXTENSIONS = (".m4a", ".aac", ".mp4", ".webm", ".wma", ".amr")


class AudioError(ValueError):
    """Audio that cannot be used; the message is one line for the user."""


class AudioWarning(UserWarning):
    """A recording of which a part could not be read; the message is one line for the user."""


def name_of(source: object) -> str:
    """A path or the name of an open file, for a message."""
    if isinstance(source, str | bytes | os.PathLike):
        return printable(source)
    return str(getattr(source, "name", "the open file"))


@contextmanager
def opened(source: Any) -> Iterator[BinaryIO]:
    """A file that can seek, at its start, of a path, "-" (standard input) or an open binary file.

    An open file is read from where it is to its end, and need not seek.
    Raises AudioError, in one line, for what is missing, empty, a folder, a web address, a terminal
    or a device, and for a pipe that delivers nothing for `PATIENCE` seconds.
    """
    if hasattr(source, "read"):
        file, mine = source, False
    elif os.fspath(source) == "-":
        file, mine = sys.stdin.buffer, False
    else:
        file, mine = _open_path(source), True
    try:
        if isinstance(file, io.TextIOBase):
            raise AudioError(f"{name_of(source)}: opened as text; open it with mode 'rb'")
        if not _seeks(file) or file.tell():
            with tempfile.SpooledTemporaryFile(IN_MEMORY) as copy:
                _copy(file, copy, name_of(source))
                yield copy  # type: ignore[misc]
        else:
            yield file
    finally:
        if mine:
            file.close()


def _open_path(path: str | os.PathLike[str]) -> BinaryIO:
    name = name_of(path)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise AudioError(f"{name}: a folder, not an audio file; name a file in it")
        if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
            raise AudioError(
                f"{name}: not a regular file, nor a pipe; save the audio to a file first"
            )
        wait = getattr(os, "O_NONBLOCK", 0) if stat.S_ISFIFO(mode) else 0
        return open(path, "rb", opener=lambda p, flags: os.open(p, flags | wait))
    except FileNotFoundError:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://?", os.fspath(path)):
            raise AudioError(
                f"{name}: a web address; download it first, for example with curl -LO"
            ) from None
        raise AudioError(f"{name}: no such audio file; check the path") from None
    except (OSError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise AudioError(f"{name}: cannot be read ({reason}); check the file") from None


def _seeks(file: BinaryIO) -> bool:
    seekable = getattr(file, "seekable", None)
    return bool(seekable()) if seekable else hasattr(file, "seek")


def _copy(file: BinaryIO, copy: Any, name: str) -> None:
    """All that comes out of a pipe; AudioError if it is a terminal or stays silent for too long."""
    try:
        number = file.fileno()
        if stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError  # what was read ahead is not in it
    except (AttributeError, OSError):
        shutil.copyfileobj(file, copy)
        copy.seek(0)
        return
    if os.isatty(number):
        raise AudioError(f"{name}: a terminal; send audio into it, for example with < a.wav")
    while True:
        if os.name == "posix" and not select.select([number], [], [], PATIENCE)[0]:
            raise AudioError(
                f"{name}: nothing came for {PATIENCE:.0f} s; is the other end running?"
            )
        data = os.read(number, COPIED)
        if not data:
            break
        copy.write(data)
    copy.seek(0)


# ---- ffmpeg -----------------------------------------------------------------------------------


def wants_ffmpeg(path: object, head: bytes) -> bool:
    """Whether a file, by its name and first bytes, is of a kind that libsndfile does not read."""
    named = isinstance(path, str | os.PathLike) and os.fspath(path).lower()
    return bool(named and named.endswith(FFMPEG_EXTENSIONS)) or head[4:8] == b"ftyp"


def ffmpeg_frames(path: str | os.PathLike[str], block: int) -> Iterator[tuple[int, Any]]:
    """Sample rate and samples (n, channels) float32, `block` frames at once, as ffmpeg reads them.

    Raises AudioError where ffmpeg is not installed or reads nothing, or ends with an error.
    """
    name = name_of(path)
    program = shutil.which("ffmpeg")
    if program is None:
        kind = Path(path).suffix.lower() or "this kind"
        raise AudioError(
            f"{name}: reading {kind} needs ffmpeg; install it (apt-get install ffmpeg), or convert "
            "the file to WAV or FLAC"
        )
    url = b"file:" + os.fsencode(os.path.abspath(path))
    command: list[str | bytes] = [program, "-nostdin", "-v", "error", "-i", url]
    command += ["-map", "0:a:0", "-f", "au", "-c:a", "pcm_f32be", "pipe:1"]
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
            assert process.stdout is not None
            try:
                yield from _au_frames(process.stdout, block)
            except GeneratorExit:
                process.kill()
                raise
        errors.seek(0)
        said = " ".join(errors.read().decode("utf-8", "backslashreplace").split())
    if process.returncode or said:
        raise AudioError(f"{name}: ffmpeg says: {said[:200] or process.returncode}")


def _au_frames(pipe: Any, block: int) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    head = pipe.read(24)
    if len(head) < 24:
        return
    offset, _, _, rate, channels = struct.unpack(">5I", head[4:])
    pipe.read(offset - 24)
    while data := pipe.read(block * channels * 4):
        samples = np.frombuffer(data[: len(data) // (4 * channels) * 4 * channels], ">f4")
        yield rate, samples.astype(np.float32).reshape(-1, channels)
