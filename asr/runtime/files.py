"""Writing files whole: the old content stays until the new one is complete."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def whole_file(path: str | Path, binary: bool = False) -> Iterator[IO[Any]]:
    """A temporary file beside `path`, UTF-8 text or `binary`, that takes its name at the end.

    Makes missing folders; after an exception nothing is left and `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    as_text: dict[str, Any] = {} if binary else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(handle, "wb" if binary else "w", **as_text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_atomically(path: str | Path, text: str) -> None:
    """Writes UTF-8 text, whole or not at all; makes missing folders."""
    with whole_file(path) as file:
        file.write(text)


def write_json(path: str | Path, result: dict[str, Any]) -> None:
    """Writes JSON with a line for every key and every item of a table, whole or not at all."""
    lines = []
    for key, value in result.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            items = (json.dumps(item, ensure_ascii=False) for item in value)
            text = "[\n  " + ",\n  ".join(items) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    write_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")


def check_writable(path: str | Path) -> None:
    """Makes the parent folders and fails now, not after the work, if no file can be written."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: a folder; name a file in it, e.g. {path / 'result.json'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); choose another") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
