"""Lists of utterances: manifests (JSON lines in NeMo's format), LibriSpeech trees, and splits.

A manifest holds one JSON object a line: `audio_filepath` (relative to the manifest's folder, or
absolute), `duration` in seconds, `text`, and optionally `speaker` and `id`; other keys are ignored.
A LibriSpeech tree is SPLIT/SPEAKER/CHAPTER/ID.flac (or another format) with `*.trans.txt` beside.
Splits are told by their names: `train*` trains, `dev*` chooses checkpoints, `test*` stays closed.
"""

from __future__ import annotations

import json
import math
import os
import random
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from asr.runtime.audio import EXTENSIONS, audio_duration
from asr.runtime.files import write_atomically

Data = str | Path | Sequence[str | Path]  # where data is, in one place or several
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


@dataclass
class Splits:
    """What training uses; `notes` say what was left out, or held out from `train` for `dev`."""

    train: list[Utterance]
    dev: list[Utterance]
    notes: list[str] = field(default_factory=list)


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


def scan_librispeech(folder: str | Path) -> Iterator[tuple[str, str, str, str | None]]:
    """All `(id, speaker, audio path, text)` of a split folder, sorted; text is normalised.

    The path is empty where a transcript has no audio, the text is None where audio has no
    transcript.
    """
    for speaker in _folders(folder):
        for chapter in _folders(speaker):
            names = sorted(name for name in os.listdir(chapter) if not name.startswith("."))
            audio = {
                os.path.splitext(name)[0]: os.path.join(chapter, name)
                for name in names
                if name.lower().endswith(EXTENSIONS)
            }
            texts: dict[str, str] = {}
            for name in names:
                if name.endswith(".trans.txt"):
                    texts.update(_read_transcripts(chapter / name))
            for id in sorted(audio.keys() | texts.keys()):
                yield id, speaker.name, audio.get(id, ""), texts.get(id)


def read_librispeech(folder: str | Path, num_workers: int = 4) -> list[Utterance]:
    """Read a LibriSpeech split folder such as `train-clean-100`; durations from the headers.

    Raises ManifestError where transcripts and audio do not match, AudioError for broken audio.
    """
    found = list(scan_librispeech(folder))
    if not found:
        raise ManifestError(f"{folder}: no SPEAKER/CHAPTER/*.trans.txt in it; check the path")
    bad = [id for id, _, audio, text in found if not audio or text is None]
    if bad:
        raise ManifestError(
            f"{folder}: {len(bad)} utterances lack audio or transcript ({_examples(bad)}); "
            "scripts/prepare_data.py leaves such out and lists them"
        )
    root = Path(folder).absolute()
    paths = [str(root / Path(audio).relative_to(folder)) for _, _, audio, _ in found]
    with ThreadPoolExecutor(num_workers) as pool:
        durations = list(pool.map(audio_duration, paths, chunksize=64))
    return [
        Utterance(path, duration, text or "", speaker, id)
        for (id, speaker, _, text), path, duration in zip(found, paths, durations, strict=True)
    ]


def places(data: Data) -> list[str]:
    """One or several paths as a list of them; ManifestError for none."""
    paths = [data] if isinstance(data, str | Path) else list(data)
    if not paths:
        raise ManifestError("no data named; give a manifest or a folder")
    return [str(path) for path in paths]


def find_sources(data: Data) -> dict[str, Path]:
    """The splits at a path or several, by name: manifests or LibriSpeech split folders.

    A path is a manifest, a folder of manifests, a split folder, or a folder of split folders. None
    of them is opened. Where several have a split of one name, the later ones are 'name of PATH'.
    """
    sources: dict[str, Path] = {}
    for place in places(data):
        for name, source in _find_sources(Path(place)).items():
            if source not in sources.values():
                sources[f"{name} of {place}" if name in sources else name] = source
    return sources


def _find_sources(path: Path) -> dict[str, Path]:
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ManifestError(f"{path}: not a manifest; expected a .json or .jsonl file")
        return {path.stem: path}
    if not path.is_dir():
        raise ManifestError(f"{path}: no such file or folder; run scripts/prepare_data.py first?")
    manifests = [p for p in sorted(path.iterdir()) if p.suffix.lower() in SUFFIXES and p.is_file()]
    if manifests:
        return {manifest.stem: manifest for manifest in manifests}
    if next(path.glob("*/*/*.trans.txt"), None):
        return {path.absolute().name: path}
    sources = {p.name: p for p in _folders(path) if next(p.glob("*/*/*.trans.txt"), None)}
    if not sources:
        raise ManifestError(
            f"{path}: neither manifests (*.json) nor LibriSpeech folders in it; "
            "scripts/prepare_data.py writes manifests"
        )
    return sources


def read_source(path: str | Path) -> list[Utterance]:
    """Read one manifest or split folder."""
    return read_librispeech(path) if Path(path).is_dir() else read_manifest(path)


def load_dataset(path: str | Path, only: str = "") -> list[Utterance]:
    """All utterances at `path` (see `find_sources`), of splits whose names begin with `only`."""
    sources = {name: p for name, p in find_sources(path).items() if name.startswith(only)}
    if not sources:
        raise ManifestError(f"{path}: no split named {only}* in it")
    return [utterance for p in sources.values() for utterance in read_source(p)]


def load_splits(data_dir: Data, dev_share: float = 0.05, seed: int = 0) -> Splits:
    """Training and development data by the names of the splits (see `find_sources`).

    Without `dev*`, a share of the speakers is held out, the same ones for the same seed. One split
    given alone trains whatever its name is, unless it is `dev*` or `test*`. Raises ManifestError
    for nothing to train on and for utterances or speakers on both sides.
    """
    sources = find_sources(data_dir)
    where = ", ".join(places(data_dir))
    alone = {p for place in places(data_dir) if len(found := _find_sources(Path(place))) == 1
             for p in found.values()}  # fmt: skip
    names: dict[str, list[str]] = {"train": [], "dev": [], "test": [], "": []}
    for name in sources:
        prefix = next((p for p in ("train", "dev", "test") if name.lower().startswith(p)), "")
        names["train" if not prefix and sources[name] in alone else prefix].append(name)
    if not names["train"]:
        raise ManifestError(
            f"{where}: no split named train* (found {', '.join(sources)}); "
            "training needs one, dev* is optional"
        )
    train, dev = (
        [replace(u, corpus=name) for name in names[part] for u in read_source(sources[name])]
        for part in ("train", "dev")
    )
    notes = [f"not used: {name} (neither train*, dev* nor test*)" for name in names[""]]
    if dev:
        check_disjoint(train, dev)
    else:
        train, dev, note = hold_out(train, dev_share, seed)
        notes.append(note)
    return Splits(train, dev, notes)


def hold_out(
    utterances: list[Utterance], share: float = 0.05, seed: int = 0
) -> tuple[list[Utterance], list[Utterance], str]:
    """Split off a share of the speakers, or of the recordings if fewer than two are known.

    Returns what stays, what is held out (at least one speaker or recording), and a note.
    """
    speakers = sorted({u.speaker for u in utterances if u.speaker})
    by_speaker = len(speakers) > 1
    groups = speakers if by_speaker else sorted({u.audio_filepath for u in utterances})
    if len(groups) < 2:
        raise ManifestError("a single recording cannot be split; add data or a dev* split")
    random.Random(seed).shuffle(groups)
    chosen = set(groups[: min(len(groups) - 1, max(1, round(share * len(groups))))])
    held = [(u.speaker if by_speaker else u.audio_filepath) in chosen for u in utterances]
    dev = [replace(u, corpus="dev") for u, out in zip(utterances, held, strict=True) if out]
    train = [u for u, out in zip(utterances, held, strict=True) if not out]
    what = f"{len(chosen)} of {len(groups)} {'speakers' if by_speaker else 'recordings'}"
    why = "" if by_speaker else "; speakers unknown, so the same voices may be in both"
    return train, dev, f"no dev* split: held out {what}, {len(dev)} utterances (seed {seed}){why}"


def check_disjoint(train: list[Utterance], dev: list[Utterance]) -> None:
    """Raise ManifestError if an utterance or a known speaker is in both.

    The same utterance: the same file, or the same id, text and duration to 10 ms by speakers that
    are not known to differ.
    """

    def key(u: Utterance) -> tuple[str, str, float]:
        return u.id, u.text, round(u.duration, 2)

    paths = {os.path.realpath(u.audio_filepath) for u in train}
    voices: dict[tuple[str, str, float], set[str]] = {}
    for u in train:
        voices.setdefault(key(u), set()).add(u.speaker)
    both = [
        u.id
        for u in dev
        if os.path.realpath(u.audio_filepath) in paths
        or ((same := voices.get(key(u))) and (not u.speaker or same & {u.speaker, ""}))
    ]
    if both:
        raise ManifestError(
            f"{len(both)} utterances are both in train* and in dev* ({_examples(both)}); "
            "remove them from one of the two"
        )
    speakers = sorted({u.speaker for u in train} & {u.speaker for u in dev} - {""})
    if speakers:
        raise ManifestError(
            f"{len(speakers)} speakers are both in train* and in dev* ({_examples(speakers)}); "
            "move each to one of the two"
        )


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


def _read_transcripts(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 text (byte {error.start})") from None
    for line in text.splitlines():
        if line.strip():
            id, _, words = line.strip().partition(" ")
            yield id, normalise(words)


def _folders(folder: str | Path) -> list[Path]:
    try:
        return sorted(p for p in Path(folder).iterdir() if p.is_dir() and p.name[0] != ".")
    except (FileNotFoundError, NotADirectoryError):
        raise ManifestError(f"{folder}: no such folder; check the path") from None


def _examples(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
