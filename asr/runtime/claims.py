"""What a header claims beside what a file holds, by the notes that libsndfile takes on opening it.

For the formats that `asr.runtime.containers` does not read itself. PAF of 8 and 16 bits, PVF and
IRCAM hold no length: of those nobody can tell that their end is missing. What goes on behind the
length of an AIFF with GSM 6.10 cannot be told either: libsndfile reads it, but gives it to no one.
"""

from __future__ import annotations

import re
from typing import Any

WIDTHS = {"PCM_U8": 1, "PCM_16": 2, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8, "DPCM_8": 1, "DPCM_16": 2}
CLAIMED_THERE = re.compile(r"(\d+) \(?should be (\d+)")  # chunks, and Psion's WVE
THERE_CLAIMED = re.compile(r"truncated\. (\d+) <--> (\d+)")  # MAT4
FRAMES = re.compile(r"Frames +: (\d+)")  # AVR and MPC2K
SAMPLES = {"MAT5": re.compile(r"Size : (\d+)\nData type"), "XI": re.compile(r" size +: (\d+)")}


def find_missing(sound: Any) -> str:
    """ "truncated (...)" for an open SoundFile whose header counts more than there is, or ""."""
    notes, form = sound.extra_info, sound.format
    pairs = [(int(claimed), int(there)) for claimed, there in CLAIMED_THERE.findall(notes)]
    pairs += [(int(claimed), int(there)) for there, claimed in THERE_CLAIMED.findall(notes)]
    if form in SAMPLES:
        there = sound.frames * sound.channels * WIDTHS.get(sound.subtype, 0)
        pairs.append((sum(map(int, SAMPLES[form].findall(notes))), there))
    for claimed, there in pairs:
        if claimed > there:
            return f"truncated ({there} of {claimed} bytes)"
    frames = FRAMES.search(notes) if form in ("AVR", "MPC2K") else None
    if frames and int(frames[1]) > sound.frames:
        return f"truncated ({sound.frames} of {frames[1]} samples)"
    return "truncated (its header counts more than there is)" if "truncated" in notes else ""


def counts_less(sound: Any) -> bool:
    """Whether the header may count less than there is, so that some of it is left unread."""
    pairs = CLAIMED_THERE.findall(sound.extra_info)
    return sound.format in ("MAT4", "SDS") or any(
        int(claimed) < int(there) for claimed, there in pairs
    )
