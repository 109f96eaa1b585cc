"""Is an audio file whole? A look at the container, a few kilobytes, before anything is decoded.

libsndfile reads truncated WAV, Ogg and MP3 files without complaint and returns what is there, and
its MP3 decoder writes to stderr about files that are no MP3. Damaged FLAC it finds by itself.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

UNKNOWN_SIZE = 0x7FFF0000  # programs that write WAV to a pipe put sizes like these in the header
OGG_PAGE = 65307  # bytes at most
ID3V1 = 128  # a tag at the end, which some count and others cut off

MP3_KBITS = {  # layer III, by MPEG version 1 or 2
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
MP3_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


def find_problem(file: BinaryIO, size: int, name: str) -> str:
    """What is wrong with an open file of `size` bytes, such as "truncated (...)"; or "".

    Formats unknown here are left to libsndfile.
    """
    head = file.read(12)
    if head[:4] == b"OggS":
        file.seek(max(0, size - OGG_PAGE))
        return _ogg_problem(file.read())
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return _wav_problem(file, size)
    sync = len(head) > 1 and head[0] == 0xFF and head[1] >= 0xE0
    if sync or head[:3] == b"ID3" or name.lower().endswith(".mp3"):
        return _mp3_problem(file, head, size)
    return ""


def _ogg_problem(tail: bytes) -> str:
    """The last page must be whole and marked as the end of its stream (RFC 3533, section 6)."""
    start = tail.rfind(b"OggS")
    page = tail[start:] if start >= 0 else b""
    segments = page[26] if len(page) > 26 else 0
    size = 27 + segments + sum(page[27 : 27 + segments])
    if len(page) < 27 + segments or len(page) < size:
        return "truncated (the last Ogg page is cut)"
    return "" if page[5] & 4 else "truncated (the Ogg stream has no end)"


def _wav_problem(file: BinaryIO, size: int) -> str:
    """The `data` chunk must lie inside the file, unless its size is a placeholder."""
    position = 12
    while position + 8 <= size:
        file.seek(position)
        name, length = struct.unpack("<4sI", file.read(8))
        position += 8
        if name == b"data":
            if length >= UNKNOWN_SIZE or position + length <= size:
                return ""
            return f"truncated ({size - position} of {length} bytes of samples)"
        position += length + length % 2
    return "truncated (no samples after the header)"


def _mp3_problem(file: BinaryIO, head: bytes, size: int) -> str:
    """Two frames must follow one another; a Xing or Info header says how many bytes there are.

    Without that header (rare) libsndfile guesses the length from the first bit rate.
    """
    start = 0
    if head[:3] == b"ID3" and len(head) >= 10:
        high, middle, low, last = head[6:10]  # seven bits each
        start = 10 + (high << 21 | middle << 14 | low << 7 | last)
    file.seek(start)
    data = file.read(1 << 16)
    frame = _first_mp3_frame(data, size - start)
    if frame < 0:
        return "not audio (no MP3 frames)"
    at = max(data.find(b"Xing", frame, frame + 64), data.find(b"Info", frame, frame + 64))
    if at < 0 or len(data) < at + 16:
        return _bare_mp3_problem(data[frame:] + file.read())
    flags = struct.unpack(">I", data[at + 4 : at + 8])[0]
    field = at + (12 if flags & 1 else 8)
    length = struct.unpack(">I", data[field : field + 4])[0] if flags & 2 else 0
    there = size - start - frame
    return "" if there + ID3V1 >= length else f"truncated ({there} of {length} bytes)"


def _bare_mp3_problem(data: bytes) -> str:
    """Frames without a Xing header must have one bit rate, and the last one must be whole."""
    position, first = 0, data[2] >> 4
    while length := _mp3_frame_length(data[position : position + 4]):
        if data[position + 2] >> 4 != first:
            return "MP3 of variable bit rate without a length (Xing header)"
        position += length
    return "truncated (the last MP3 frame is cut)" if position > len(data) else ""


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
