"""LibriSpeech trees: SPLIT/SPEAKER/CHAPTER/ID.flac (or another format), `*.trans.txt` beside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from asr.corpus.manifest import ManifestError, Utterance, examples, normalise
from asr.runtime.audio import EXTENSIONS, audio_duration


def scan_librispeech(folder: str | Path) -> Iterator[tuple[str, str, str, str | None]]:
    """All `(id, speaker, audio path, text)` of a split folder, sorted; text is normalised.

    The path is empty where a transcript has no audio, the text is None where audio has no
    transcript.
    """
    for speaker in folders(folder):
        for chapter in folders(speaker):
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
            f"{folder}: {len(bad)} utterances lack audio or transcript ({examples(bad)}); "
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


def _read_transcripts(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 text (byte {error.start})") from None
    for line in text.splitlines():
        if line.strip():
            id, _, words = line.strip().partition(" ")
            yield id, normalise(words)


def folders(folder: str | Path) -> list[Path]:
    try:
        return sorted(p for p in Path(folder).iterdir() if p.is_dir() and p.name[0] != ".")
    except (FileNotFoundError, NotADirectoryError):
        raise ManifestError(f"{folder}: no such folder; check the path") from None
