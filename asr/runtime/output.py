"""Where results go as they come: standard output, one file, or a folder with a file a recording."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from asr.runtime import formats
from asr.runtime.files import check_writable, printable, stream_of, write_atomically
from asr.runtime.result import Result


class Output:
    """Takes the results of recordings one by one; what was taken stays whatever comes later.

    The text of one recording replaces the file whole. With several, the file begins anew with the
    first result and each is in it when the next one begins. ValueError, before anything is read,
    for a place that cannot be written or cannot hold the format, or is one of the `audio` files,
    which the results' `names` are where not given.
    """

    def __init__(
        self, path: str | None, form: str, named: bool, names: Sequence[Path],
        audio: Sequence[Path] | None = None,
    ) -> None:  # fmt: skip
        self._form, self._named = form, named
        self._path = Path(path) if path else None
        self._folder = bool(path) and (os.path.isdir(path or "") or str(path).endswith(os.sep))
        self._file: IO[str] | None = None
        self._stack = ExitStack()
        if named and form in formats.SUBTITLES and not self._folder:
            raise ValueError(
                f"--output_format {form}: a file holds one recording; name a folder for several, "
                "--output_path FOLDER/"
            )
        if self._path:
            self._check(names, names if audio is None else audio)

    def _check(self, names: Sequence[Path], audio: Sequence[Path]) -> None:
        targets = Counter(map(self._target, names))
        heard = {identity(one) for one in audio} - {None}
        for target, count in targets.items():
            if identity(target) in heard:
                raise ValueError(f"{target}: is the audio itself; choose another --output_path")
            if self._folder and count > 1:
                raise ValueError(f"{target}: two recordings have this name; transcribe them apart")
        check_writable(next(iter(targets)))

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, name: Path, result: Result) -> None:
        """Writes a recording's result under its name, one of `names`."""
        alone = self._folder or not self._named
        text = formats.render(result, self._form, printable(name), named=not alone)
        heading = formats.header(self._form, named=not alone)
        if self._path and alone:
            write_atomically(self._target(name), heading + text)
            return
        if self._file is None:
            self._file = sys.stdout
            if self._path:
                place = stream_of(self._path)
                file = open(self._path if place is None else place, "w", encoding="utf-8")  # noqa: SIM115
                self._file = self._stack.enter_context(file)
            text = heading + text
        self._file.write(text)
        self._file.flush()

    def _target(self, name: Path) -> Path:
        """The file for a recording's result."""
        assert self._path is not None
        if not self._folder:
            return self._path
        return self._path / (name.stem + formats.SUFFIXES[self._form])


def identity(path: Path) -> tuple[int, int] | None:
    """What is equal for all paths to one file; None where there is none."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino
