"""What data there is at a place, and its splits, told by their names.

`train*` trains, `dev*` chooses checkpoints, `test*` stays closed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from asr.corpus.librispeech import folders, read_librispeech
from asr.corpus.manifest import SUFFIXES, ManifestError, Utterance, examples, read_manifest

Data = str | Path | Sequence[str | Path]  # where data is, in one place or several


@dataclass
class Splits:
    """What training uses; `notes` say what was left out, or held out from `train` for `dev`."""

    train: list[Utterance]
    dev: list[Utterance]
    notes: list[str] = field(default_factory=list)


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
    sources = {p.name: p for p in folders(path) if next(p.glob("*/*/*.trans.txt"), None)}
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
        notes += check_disjoint(train, dev)
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


def check_disjoint(train: list[Utterance], dev: list[Utterance]) -> list[str]:
    """Raise ManifestError if an utterance or a known speaker is in both; returns notes.

    The same utterance: the same file, or the same id, text and duration to 10 ms by speakers that
    are not known to differ. One person's own recordings have one speaker, who may be in both.
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
            f"{len(both)} utterances are both in train* and in dev* ({examples(both)}); "
            "remove them from one of the two"
        )
    speakers = sorted({u.speaker for u in train} & {u.speaker for u in dev} - {""})
    if not speakers:
        return []
    if {u.speaker for u in (*train, *dev)} == {speakers[0]}:
        return [
            f"{speakers[0]} alone speaks, in train* and in dev*: "
            "the dev error rate says nothing of other voices"
        ]
    raise ManifestError(
        f"{len(speakers)} speakers are both in train* and in dev* ({examples(speakers)}); "
        "move each to one of the two"
    )
