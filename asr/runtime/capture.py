"""Sound as it is made, in chunks: from a microphone or as raw samples on standard input."""

from __future__ import annotations

import queue
import signal
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt

Chunk = npt.NDArray[np.int16]  # (N,), mono
SECONDS = 0.1  # of a chunk


def from_stream(stream: IO[bytes], sample_rate: int) -> Iterator[Chunk]:
    """Raw 16-bit little-endian samples of a stream, as they arrive, to its end."""
    read = getattr(stream, "read1", stream.read)  # without waiting until so many are there
    rest = b""
    while data := read(2 * int(SECONDS * sample_rate)):
        data = rest + data
        whole = len(data) // 2 * 2
        rest = data[whole:]
        yield np.frombuffer(data[:whole], "<i2")


def from_microphone(sample_rate: int) -> Iterator[Chunk]:
    """What the default microphone hears, without an end; ValueError where there is none."""
    try:
        import sounddevice
    except ModuleNotFoundError:
        raise ValueError(
            "--microphone needs the package sounddevice: pip install sounddevice"
        ) from None
    except OSError:  # PortAudio, which only some of its wheels hold
        raise ValueError("--microphone needs PortAudio: apt-get install libportaudio2") from None
    heard: queue.SimpleQueue[Chunk] = queue.SimpleQueue()

    def keep(block: Any, *_: Any) -> None:
        heard.put(np.array(block[:, 0]))

    try:
        with sounddevice.InputStream(
            samplerate=sample_rate, channels=1, dtype="int16",
            blocksize=int(SECONDS * sample_rate), callback=keep,
        ):  # fmt: skip
            while True:
                yield heard.get()
    except sounddevice.PortAudioError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"no microphone that can be opened ({reason}); connect one") from None


def until_interrupted(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The chunks until Ctrl-C, which ends the waiting for one but no work on those that came."""
    waiting = asked = False

    def ask(*_: Any) -> None:
        nonlocal asked
        asked = True
        if waiting:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ask)
    source = iter(chunks)
    try:
        while not asked:
            waiting = True
            chunk = next(source, None)
            waiting = False
            if chunk is None:
                return
            yield chunk
    except KeyboardInterrupt:
        return
    finally:
        signal.signal(signal.SIGINT, before)
