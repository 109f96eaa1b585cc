"""Speech data as people have it: Common Voice, tables, folders of audio with texts, Kaldi folders.

Each reader yields `Found`: where the audio lies, its text as it is written, None where it has none,
and what else is said of it. Whether the audio is good is for `asr.corpus.prepare` to see.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from asr.corpus.manifest import ManifestError, tidy
from asr.runtime.audio import EXTENSIONS

TABLES = (".csv", ".tsv")
AUDIO = ("audio_filepath", "path", "audio", "file", "file_name", "filename", "wav", "audio_path")
TEXT = ("text", "sentence", "transcript", "transcription", "normalized_text")
SPEAKER = ("speaker", "client_id", "speaker_id")


class Found(NamedTuple):
    """A recording of a corpus, not yet looked at."""

    audio: str
    text: str | None
    speaker: str = ""
    id: str = ""


Reader = Callable[[Path], Iterator[Found]]


def reader_of(path: Path) -> Reader | None:
    """What can read the corpus at `path`; None for manifests, LibriSpeech and what is no corpus."""
    if path.is_file():
        return read_table if path.suffix.lower() in TABLES else None
    if (path / "wav.scp").is_file():
        return read_kaldi
    if (path / "validated.tsv").is_file():
        return read_common_voice
    if path.is_dir() and any(find_pairs(path)):
        return read_pairs
    return None


def read_table(path: Path, folders: tuple[str, ...] = ("",)) -> Iterator[Found]:
    """A CSV or TSV file whose first line names the columns.

    Audio is looked for in `folders` beside the table, with or without an ending.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".tsv":
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            rows = csv.DictReader(file)
        names = {(name or "").strip().lower(): name for name in rows.fieldnames or []}
        audio, text, speaker = (
            next((names[name] for name in known if name in names), None)
            for known in (AUDIO, TEXT, SPEAKER)
        )
        if audio is None or text is None:
            raise ManifestError(
                f"{path}: its first line names the columns {', '.join(names) or 'not at all'}; "
                f"needed are one of {', '.join(AUDIO)} and one of {', '.join(TEXT)}"
            )
        for row in rows:
            name = (row[audio] or "").strip()
            place = find_audio(path.parent, name, folders)
            said = None if row[text] is None else tidy(row[text])
            yield Found(place, said, (row.get(speaker or "") or "")[:16], Path(name).stem)


def read_common_voice(path: Path) -> Iterator[Found]:
    """A language's folder as Common Voice publishes it: validated.tsv and clips/."""
    yield from read_table(path / "validated.tsv", ("clips", ""))


def read_pairs(path: Path) -> Iterator[Found]:
    """Audio files with a text file of the same name beside each, in any subfolders."""
    for audio in sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS):
        beside = audio.with_suffix(".txt")
        text = read_text(beside) if beside.is_file() else None
        speaker = audio.parent.name if audio.parent != path else ""
        yield Found(str(audio.absolute()), text, speaker, audio.stem)


def find_pairs(path: Path) -> Iterator[Path]:
    """The text files that have audio of the same name beside them."""
    for text in path.rglob("*.txt"):
        if any(text.with_suffix(ending).is_file() for ending in EXTENSIONS):
            yield text


def read_kaldi(path: Path) -> Iterator[Found]:
    """A Kaldi data folder: wav.scp, text and, if it is there, utt2spk."""
    if (path / "segments").is_file():
        raise ManifestError(f"{path}: has segments; cut the recordings into utterances first")
    texts, speakers = (
        dict(pair(line) for line in read_lines(path / name)) for name in ("text", "utt2spk")
    )
    for line in read_lines(path / "wav.scp"):
        id, place = pair(line)
        if place.endswith("|"):
            raise ManifestError(f"{path / 'wav.scp'}: {id} is a command; write its audio to a file")
        text = texts.get(id)
        where = find_audio(path, place, ("",))
        yield Found(where, None if text is None else tidy(text), speakers.get(id, ""), id)


def pair(line: str) -> tuple[str, str]:
    """The first word of a line, and the rest."""
    first, _, rest = line.strip().partition(" ")
    return first, rest.strip()


def read_lines(path: Path) -> list[str]:
    """The lines of a text that are not blank; none where there is no such file."""
    if not path.is_file():
        return []
    return [line for line in read_text(path, keep=True).splitlines() if line.strip()]


def read_text(path: Path, keep: bool = False) -> str:
    """A text file, tidied or kept as it is; ManifestError where it is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 text (byte {error.start})") from None
    return text if keep else tidy(text)


def find_audio(base: Path, name: str, folders: tuple[str, ...]) -> str:
    """The path of a recording named in a table; the first guess where none of them is there."""
    guesses = [
        os.path.join(base.absolute(), folder, name + ending)
        for folder in folders
        for ending in ("", *EXTENSIONS)
    ]
    return next((guess for guess in guesses if os.path.isfile(guess)), guesses[0])
