"""Where a result comes from: the commit and the command, with no path that names a place."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def commit() -> str:
    """The checkout's commit, with `+` after it where tracked files differ; '' outside of git."""
    if not (ROOT / ".git").exists():
        return ""
    head = _git("rev-parse", "--short=12", "HEAD")
    return head + ("+" if head and _git("status", "--porcelain", "-uno") else "")


def command_line(program: str, argv: Sequence[str] | None = None) -> str:
    """The command as typed, `python PROGRAM ARGUMENTS`; paths as `portable_path` writes them."""
    arguments = sys.argv[1:] if argv is None else argv
    return shlex.join(["python", program, *map(portable_path, arguments)])


def portable_path(path: str) -> str:
    """A relative path as it is; an absolute one from the working directory, or cut to two parts."""
    if not os.path.isabs(path):
        return path
    here = Path.cwd()
    if Path(path).is_relative_to(here):
        return Path(path).relative_to(here).as_posix()
    if Path(path).is_relative_to(here.parent):
        return (Path("..") / Path(path).relative_to(here.parent)).as_posix()
    return ".../" + "/".join(Path(path).parts[-2:]).lstrip("/")


def _git(*arguments: str) -> str:
    try:
        out = subprocess.run(
            ["git", "-C", str(ROOT), *arguments],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return out.stdout.strip()
