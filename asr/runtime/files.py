"""Writing files whole: the old content stays until the new one is complete."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def whole_file(path: str | Path, binary: bool = False) -> Iterator[IO[Any]]:
    """A temporary file, UTF-8 text or `binary`, whose contents `path` has at the end.

    Makes missing folders; after an exception nothing is left and `path` is as it was. A link stays
    one: what it leads to is written. What cannot be replaced by another file is written to instead:
    pipes, devices and /dev/stdout as things come; a file with several names, a mounted one, or one
    in a folder that takes no new files, at the end.
    """
    path = Path(path)
    text: dict[str, Any] = {} if binary else {"encoding": "utf-8", "newline": "\n"}
    if (stream := stream_of(path)) is not None:
        with open(stream, "wb" if binary else "w", **text) as file:
            yield file
        return
    target = Path(os.path.realpath(path))
    handle, temporary, beside = _temporary(target)
    try:
        with open(handle, "wb" if binary else "w", **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not beside or not _replace(temporary, target):
            with open(temporary, "rb") as new, open(target, "wb") as old:
                shutil.copyfileobj(new, old)
            os.unlink(temporary)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def stream_of(path: Path) -> Path | int | None:
    """What to open where `path` is no file to be replaced: itself, or a copy of a descriptor."""
    descriptors = {"/dev/stdout": 1, "/dev/stderr": 2}
    found = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", str(path))
    number = int(found[1]) if found else descriptors.get(str(path))
    if number is not None:
        return os.dup(number)
    return path if path.exists() and not path.is_file() and not path.is_dir() else None


def _temporary(target: Path) -> tuple[int, str, bool]:
    """A new file, open, and whether it lies beside `target` and may take its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.")
    except OSError:
        if not os.access(target, os.W_OK):
            raise
        return *tempfile.mkstemp(), False
    return handle, name, not target.exists() or target.stat().st_nlink == 1


def _replace(temporary: str, target: Path) -> bool:
    """Gives a file its place and its mode; False where a mounted file is in it."""
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
    with suppress(OSError):  # some file systems know no modes
        os.chmod(temporary, mode)
    try:
        os.replace(temporary, target)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


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
    if (stream := stream_of(path)) is not None:
        if isinstance(stream, int):
            os.close(stream)
        return
    try:
        handle, name, _ = _temporary(Path(os.path.realpath(path)))
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); choose another") from None


def printable(path: str | bytes | os.PathLike[str]) -> str:
    """A path for people: bytes that are no UTF-8 and control characters are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
