"""What an audio file holds and whether it is whole, seen from its container before decoding.

libsndfile reads one stream a file, stops where the header says, and says nothing of the rest: a
recording that goes on behind a joined MP3's first part, in a chained Ogg's next stream or behind
the size in a WAV's header would be lost unnoticed. `find_parts` finds them all; a `Part` shows
libsndfile one of them as a file of its own, its header mended.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

UNKNOWN_SIZE = 0x7FFF0000  # programs that write WAV to a pipe put sizes like these in the header
SCAN = 1 << 20  # bytes that are looked through at once
ID3V1 = 128  # a tag at the end, which some count and others cut off
FLAC_START = b"fLaC\0\0\0\x22"  # with the header of STREAMINFO

MP3_KBITS = {  # layer III, by MPEG version 1 or 2
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
MP3_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


@dataclass(frozen=True)
class Span:
    """Where a part of a file lies, and what of its header is to be read in another way."""

    start: int
    stop: int
    patches: tuple[tuple[int, bytes], ...] = field(default=())  # (place in the file, bytes)


class Part(io.RawIOBase):
    """A part of an open file, as a file; closing it leaves the file open."""

    def __init__(self, file: BinaryIO, span: Span) -> None:
        self._file, self._span, self._at = file, span, 0
        self.mended = bool(span.patches)  # its header counted less than there is

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self._at, self._span.stop - self._span.start)[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        place = self._span.start + self._at
        count = max(0, min(len(buffer), self._span.stop - place))
        self._file.seek(place)
        data = bytearray(self._file.read(count))
        for at, patch in self._span.patches:
            for i, value in enumerate(patch, at - place):
                if 0 <= i < len(data):
                    data[i] = value
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def find_parts(file: BinaryIO, size: int, name: str) -> tuple[list[Span], str]:
    """The recordings in an open file of `size` bytes, and what is wrong, "truncated (...)", or "".

    No parts: there is nothing to read. Formats unknown here are one part.
    """
    start = _skip_tags(file, 0)
    head = _read(file, start, 12)
    if head[:4] == b"OggS":
        return _ogg_parts(file, start, size)
    if head[:4] == b"fLaC":
        return _signed_parts(file, start, size, FLAC_START), ""
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return _wav_parts(file, start, size)
    if head[:4] == b".snd" and len(head) == 12:
        offset, length = struct.unpack(">II", head[4:])
        less = length < size - start - offset
        return [Span(start, size, ((start + 8, b"\xff" * 4),) if less else ())], ""
    if head[:4] == b"FORM" and head[8:11] == b"AIF":
        return _chunk_parts(file, start, size, start + 12, ">4sI", b"SSND")
    if head[:4] == b"caff":
        return _chunk_parts(file, start, size, start + 8, ">4sQ", b"data")
    if head[:7] == b"NIST_1A":
        return _sphere_parts(file, start, size)
    sync = len(head) > 1 and head[0] == 0xFF and head[1] >= 0xE0
    if sync or (start and not head[:4].isalnum()) or name.lower().endswith(".mp3"):
        return _mp3_parts(file, start, size)
    return [Span(start, size)], ""


def _read(file: BinaryIO, place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)


def _skip_tags(file: BinaryIO, place: int) -> int:
    """The place behind the ID3v2 tags at `place`."""
    while True:
        head = _read(file, place, 10)
        if head[:3] != b"ID3" or len(head) < 10:
            return place
        high, middle, low, last = (byte & 127 for byte in head[6:10])  # seven bits each
        place += 10 + (high << 21 | middle << 14 | low << 7 | last) + 10 * (head[5] >> 4 & 1)


def _find_all(file: BinaryIO, signature: bytes, start: int, size: int) -> Iterator[int]:
    """Every place of `signature` from `start` on."""
    place = start
    while place < size:
        data = _read(file, place, SCAN + len(signature) - 1)
        at = data.find(signature)
        while at >= 0:
            yield place + at
            at = data.find(signature, at + 1)
        place += SCAN


def _signed_parts(file: BinaryIO, start: int, size: int, signature: bytes) -> list[Span]:
    """One part from each place of a signature to the next."""
    places = list(_find_all(file, signature, start + 1, size))
    return [Span(a, b) for a, b in zip([start, *places], [*places, size], strict=True)]


# ---- Ogg (RFC 3533) ---------------------------------------------------------------------------


def _ogg_parts(file: BinaryIO, start: int, size: int) -> tuple[list[Span], str]:
    """One part a chained stream; each must end with a whole page that is marked as its end."""
    starts, ended, place, behind = [start], False, start, False
    problem = ""
    while (page := _read(file, place, 27 + 255))[:4] == b"OggS" and len(page) > 26:
        first, last = bool(page[5] & 2), bool(page[5] & 4)
        if first and behind:  # a stream begins, and not beside others that just began
            problem = problem or ("" if ended else "truncated (an Ogg stream in it has no end)")
            starts.append(place)
        behind, ended = not first or last, last
        segments = page[26]
        length = 27 + segments + sum(page[27 : 27 + segments])
        if len(page) < 27 + segments or place + length > size:
            problem = "truncated (the last Ogg page is cut)"
            break
        place += length
    else:
        if place < size and (lost := next(_find_all(file, b"OggS\0", place + 1, size), 0)):
            problem = f"damaged ({lost - place} bytes at byte {place} are no Ogg)"
        elif not ended:
            problem = problem or "truncated (the Ogg stream has no end)"
    return [Span(a, b) for a, b in zip(starts, [*starts[1:], size], strict=True)], problem


# ---- WAV --------------------------------------------------------------------------------------


def _wav_parts(file: BinaryIO, start: int, size: int) -> tuple[list[Span], str]:
    """The `data` chunk must lie inside the file, unless its size is a placeholder.

    What lies behind it and is no chunk are samples too: the program that wrote them did not come to
    mend the header. Another WAV behind is a part of its own.
    """
    place, data, wide = start + 12, 0, 0
    while place + 8 <= size:
        name, length = struct.unpack("<4sI", _read(file, place, 8))
        if name in (b"RIFF", b"RF64") and data:
            rest, problem = _wav_parts(file, place, size)
            return [Span(start, place), *rest], problem
        if name == b"ds64":
            wide = place + 16  # where the size of the samples is, in 64 bits
        if name == b"data" and not data:
            data, there = place + 8, size - place - 8
            if wide and length == 0xFFFFFFFF:
                (length,) = struct.unpack("<Q", _read(file, wide, 8))
            elif length >= UNKNOWN_SIZE:
                return [Span(start, size)], ""
            if length > there:
                problem = f"truncated ({there} of {length} bytes of samples)"
                return [Span(start, size)] if there else [], problem
        elif data and not (name.isascii() and name.decode("ascii").isprintable()):
            field_at = wide or data - 4
            patch = struct.pack("<Q" if wide else "<I", size - data)
            return [Span(start, size, ((field_at, patch),))], ""
        place += 8 + length + length % 2
    return ([Span(start, size)], "") if data else ([], "truncated (no samples after the header)")


# ---- AIFF, CAF, SPHERE ------------------------------------------------------------------------


def _chunk_parts(
    file: BinaryIO, start: int, size: int, place: int, header: str, samples: bytes
) -> tuple[list[Span], str]:
    """Chunks from `place` on, each with a name and a length as `header` packs them.

    The length of the one with the samples must lie inside the file; what lies behind it and is no
    chunk are samples too.
    """
    width = struct.calcsize(header)
    even = header == ">4sI"  # AIFF's chunks begin at even bytes
    begin = 0  # of the samples, behind the header of their chunk
    while place + width <= size:
        name, length = struct.unpack(header, _read(file, place, width))
        if begin and name == (b"FORM" if even else b"caff"):  # another file behind
            inside = place + (12 if even else 8)
            rest, problem = _chunk_parts(file, place, size, inside, header, samples)
            return [Span(start, place), *rest], problem
        is_chunk = name.isascii() and name.decode("ascii").isprintable()
        if begin and not is_chunk:
            return [_counted(start, size, begin, header, size - begin)], ""
        place += width
        if name == samples and not begin:
            begin, there = place, size - place
            unknown = not length or length == (1 << 8 * (width - 4)) - 1
            if length > there or unknown:
                problem = "" if unknown else f"truncated ({there} of {length} bytes of samples)"
                return [_counted(start, size, begin, header, there)] if there else [], problem
        place += length + (length % 2 if even else 0)
    return ([Span(start, size)], "") if begin else ([], "truncated (no samples after the header)")


def _counted(start: int, size: int, begin: int, header: str, length: int) -> Span:
    """The file with `length` bytes counted in the chunk whose contents start at `begin`."""
    patch = struct.pack(header, b"", length)[4:]
    return Span(start, size, ((begin - len(patch), patch),))


def _sphere_parts(file: BinaryIO, start: int, size: int) -> tuple[list[Span], str]:
    """Lines of a name, a type and a value; libsndfile reads all that is there, and says nothing."""
    lines = _read(file, start, 1024).decode("ascii", "replace").split("\n")
    fields = {line.split()[0]: line.split()[-1] for line in lines if len(line.split()) == 3}
    names = ("sample_count", "channel_count", "sample_n_bytes")
    try:
        begin = start + int(lines[1])
        length = math.prod(int(fields[name]) for name in names)
    except (IndexError, KeyError, ValueError):
        return [Span(start, size)], ""
    there = max(0, size - begin)
    packed = "," in fields.get("sample_coding", "")  # as in "pcm,embedded-shorten-v2.00"
    problem = f"truncated ({there} of {length} bytes of samples)"
    return [Span(start, size)], problem if there < length and not packed else ""


# ---- MP3 --------------------------------------------------------------------------------------


def _mp3_parts(file: BinaryIO, start: int, size: int) -> tuple[list[Span], str]:
    """Two frames must follow one another; a Xing or Info header says how many bytes there are.

    Without that header (rare) libsndfile guesses the length from the first bit rate. Behind what
    either says, another part may begin, with tags of its own.
    """
    parts: list[Span] = []
    while True:
        data = _read(file, start, 1 << 16)
        frame = _first_mp3_frame(data, size - start)
        if frame < 0:
            return parts, "" if parts else "not audio (no MP3 frames)"
        begin = start + frame
        at = max(data.find(b"Xing", frame, frame + 64), data.find(b"Info", frame, frame + 64))
        if at < 0 or len(data) < at + 16:
            stop, problem = _bare_mp3_end(file, begin, size)
        else:
            flags = struct.unpack(">I", data[at + 4 : at + 8])[0]
            where = at + (12 if flags & 1 else 8)
            length = struct.unpack(">I", data[where : where + 4])[0] if flags & 2 else 0
            there = size - begin
            cut = there + ID3V1 < length
            problem = f"truncated ({there} of {length} bytes)" if cut else ""
            stop = min(size, begin + length) if length else size
        behind = _next_mp3(file, stop, size)
        parts.append(Span(begin, size if behind is None else stop))
        if problem or behind is None:
            return parts, problem
        start = behind


def _next_mp3(file: BinaryIO, stop: int, size: int) -> int | None:
    """Where another part begins behind `stop`, two frames within a kilobyte behind tags; or None.

    Some count a tag at the end into a part, and some headers count their own frame twice.
    """
    start = _skip_tags(file, stop)
    if start + ID3V1 >= size:
        return None
    data = _read(file, start, 1 << 14)
    frame = _first_mp3_frame(data[:4096], min(size - start, 4097))
    return start if 0 <= frame <= 1024 else None


def _bare_mp3_end(file: BinaryIO, begin: int, size: int) -> tuple[int, str]:
    """Where frames without a Xing header end; they must have one bit rate, and be whole."""
    place, first = begin, -1
    at, data = 0, b""
    while True:
        if len(data) < at + 4:
            at, data = 0, _read(file, place, SCAN)
        header = data[at : at + 4]
        length = _mp3_frame_length(header)
        if not length:
            return place, ""
        first = header[2] >> 4 if first < 0 else first
        if header[2] >> 4 != first:
            return place, "MP3 of variable bit rate without a length (Xing header)"
        place, at = place + length, at + length
        if place > size:
            return size, "truncated (the last MP3 frame is cut)"


def _first_mp3_frame(data: bytes, size: int) -> int:
    """Where the first frame that has a second one behind it starts, or -1."""
    position = data.find(b"\xff")
    while position >= 0:
        length = _mp3_frame_length(data[position : position + 4])
        behind = position + length
        if length and (behind >= size or _mp3_frame_length(data[behind : behind + 4])):
            return position
        position = data.find(b"\xff", position + 1)
    return -1


def _mp3_frame_length(header: bytes) -> int:
    """Bytes of the frame with this 4-byte header; 0 if it is none of layer III."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return 0
    version, bitrate, rate = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or bitrate in (0, 15) or rate == 3:
        return 0
    kbits = MP3_KBITS[1 if version == 3 else 2][bitrate]
    samples = 144_000 if version == 3 else 72_000
    return samples * kbits // MP3_RATES[version][rate] + (header[2] >> 1 & 1)
