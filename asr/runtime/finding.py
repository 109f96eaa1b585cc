"""Finding recordings in folders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from asr.runtime.audio import EXTENSIONS
from asr.runtime.files import printable
from asr.runtime.sources import FFMPEG_EXTENSIONS


def find_audio(paths: Sequence[str]) -> list[Path]:
    """The files named, and those below the folders named, in order of their paths.

    Links to folders are followed, each folder once; hidden files and folders are passed over. What
    only ffmpeg reads is found too, whether ffmpeg is there or not. Raises ValueError for a folder
    without audio, OSError for one that cannot be read.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(_walk(path))
            if not inside:
                kinds = ", ".join(EXTENSIONS + FFMPEG_EXTENSIONS)
                raise ValueError(f"{printable(path)}: no audio in this folder ({kinds})")
            found += inside
        else:
            found.append(path)
    return found


def _walk(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    seen: set[tuple[int, int]] = set()
    for where, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        info = os.stat(where)
        if (info.st_dev, info.st_ino) in seen:
            folders.clear()
            continue
        seen.add((info.st_dev, info.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(where, name)
            kind = path.suffix.lower() in EXTENSIONS + FFMPEG_EXTENSIONS
            if kind and not name.startswith(".") and path.is_file():
                yield path
