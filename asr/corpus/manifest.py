"""Lists of utterances: manifests, JSON lines in NeMo's format.

A manifest holds one JSON object a line: `audio_filepath` (relative to the manifest's folder, or
absolute), `duration` in seconds, `text`, and optionally `speaker` and `id`; other keys are ignored.
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from asr.runtime.files import write_atomically

SUFFIXES = (".json", ".jsonl")
APOSTROPHES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u02bc": "'"})


class ManifestError(ValueError):
    """Data that cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class Utterance:
    """One recording and its transcript; `duration` in seconds, `id` by default the file's stem.

    `written` is the text with its capitals, where the source has such.
    """

    audio_filepath: str
    duration: float
    text: str
    speaker: str = ""
    id: str = ""
    written: str = field(default="", compare=False)
    corpus: str = ""  # name of the split that it was read from

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", Path(self.audio_filepath).stem)


def normalise(text: str) -> str:
    """Lower case, NFKC, straight apostrophes, single spaces; of the Turkish dotted I an i."""
    return tidy(text).replace("\u0130", "i").lower()


def tidy(text: str) -> str:
    """NFKC, straight apostrophes, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).translate(APOSTROPHES).split())


def read_manifest(path: str | Path, measured: bool = True) -> list[Utterance]:
    """Read a manifest; texts are normalised, audio paths made absolute.

    Every line needs a duration, unless it is not `measured` yet: then it is 0.

    A relative path is taken from the manifest's folder or, where there is no such file but one in
    the working directory, from there. Raises ManifestError naming file and line.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such manifest; check the path") from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from None
    folder = path.parent.absolute()
    utterances = [
        _parse(line, folder, f"{path}, line {number}", measured)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not utterances:
        raise ManifestError(f"{path}: no utterances in it; write one JSON object a line")
    return utterances


def write_manifest(
    path: str | Path, utterances: Iterable[Utterance], relative_to: str | Path | None = None
) -> None:
    """Write a manifest atomically: the file is the old one or the whole new one.

    With `relative_to` (usually the manifest's folder) paths below that folder become relative.
    """
    path = Path(path)
    lines = []
    for utterance in utterances:
        audio = utterance.audio_filepath
        if relative_to is not None and Path(audio).is_absolute():
            base = Path(relative_to).absolute()
            if Path(audio).is_relative_to(base):
                audio = Path(audio).relative_to(base).as_posix()
        entry: dict[str, object] = {
            "audio_filepath": audio,
            "duration": round(utterance.duration, 7),
            "text": utterance.text,
        }
        if utterance.speaker:
            entry["speaker"] = utterance.speaker
        if utterance.id != Path(audio).stem:
            entry["id"] = utterance.id
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines))


def _parse(line: bytes, folder: Path, where: str, measured: bool) -> Utterance:
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ManifestError(f"{where}: not UTF-8 text; save the manifest as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: not a JSON object ({error})") from None
    if not isinstance(entry, dict):
        raise ManifestError(
            f"{where}: expected one JSON object a line, not a {type(entry).__name__}"
        )
    if not measured and entry.get("duration") is None:
        entry["duration"] = 0.0
    missing = [key for key in ("audio_filepath", "duration", "text") if entry.get(key) is None]
    if missing:
        raise ManifestError(f"{where}: {', '.join(missing)} missing; every line needs it")
    audio, duration, text = entry["audio_filepath"], entry["duration"], entry["text"]
    if not isinstance(audio, str) or not audio or "\0" in audio or not isinstance(text, str):
        raise ManifestError(f"{where}: audio_filepath and text must be strings")
    number = isinstance(duration, (int, float)) and not isinstance(duration, bool)
    if not number or not math.isfinite(duration) or duration < 0:
        raise ManifestError(f"{where}: duration is {duration!r}; expected seconds")
    if entry.get("offset"):
        raise ManifestError(f"{where}: offset is not supported; cut the audio into files first")
    path = os.path.join(folder, os.path.expanduser(audio))
    if not os.path.isabs(audio) and not os.path.exists(path) and os.path.exists(audio):
        path = os.path.abspath(audio)
    speaker, id = entry.get("speaker"), entry.get("id")
    return Utterance(
        os.path.normpath(path),
        float(duration),
        normalise(text),
        "" if speaker is None else str(speaker),
        "" if id is None else str(id),
        tidy(text),
    )


def examples(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
