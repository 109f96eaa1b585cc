"""What every command shares: its parser, flags from dataclasses, one line for a user's mistake."""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import time
import tomllib
from collections.abc import Callable, Container
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn

from asr import __version__
from asr.runtime.files import printable


class Parser(argparse.ArgumentParser):
    """A command's parser: --help opens with its purpose, --version, complaints of one line.

    A complaint is a ValueError, for `guarded` to print.
    """

    def __init__(self, purpose: str | None = None, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.purpose = (purpose or "").strip()
        version = f"conformer-asr-edge {__version__}"
        self.add_argument("--version", action="version", version=version, help="show the version")

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options")

    def format_help(self) -> str:
        """The purpose, then only what must be given, then every option with its meaning."""
        needed = [shown(action) for action in self._actions if action.required]
        self.usage = " ".join([self.prog, *needed, "[options]"]).replace("%", "%%")
        return f"{self.purpose}\n\n{super().format_help()}".lstrip()

    def add_output_path(self, text: str) -> None:
        """--output_path, a file; also by the name that it has in the commands of older results."""
        self.add_argument("--output_path", metavar="FILE", help=text)
        self.add_argument("--output_file", dest="output_path", help=argparse.SUPPRESS)


def shown(action: argparse.Action) -> str:
    """An argument as a usage line has it."""
    value = "{" + ",".join(action.choices) + "}" if action.choices else action.dest.upper()
    value = str(action.metavar or value) + " ..." * (action.nargs == "+")
    return f"{action.option_strings[0]} {value}" if action.option_strings else value


class Progress:
    """How far a long piece of work is, in one line on a terminal that is cleared at the end."""

    QUIET = 1.0  # seconds in which nothing is shown

    def __init__(self, name: str) -> None:
        self._name = name
        self._start = time.monotonic()
        self._on = sys.stderr.isatty()
        self._width = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._write("")

    def show(self, done: str) -> None:
        """Says what is done."""
        if time.monotonic() - self._start > self.QUIET:
            self._write(f"{self._name}: {done}")

    def _write(self, text: str) -> None:
        if self._on and (text or self._width):
            print("\r" + text.ljust(self._width) + "\r" * (not text), end="", flush=True,
                  file=sys.stderr)  # fmt: skip
            self._width = len(text)


def guarded(function: Callable[[], int | None]) -> int:
    """Runs a command; a ValueError or OSError becomes one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a character that a terminal lacks is escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return function() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 2


def describe(error: BaseException) -> str:
    """An exception in one line; operating-system errors name the file.

    Of one that PyTorch raises again for a loader's process, the last line has what happened.
    """
    if isinstance(error, OSError) and error.strerror:
        where = f"{printable(error.filename)}: " if error.filename else ""
        return f"{where}{error.strerror}"
    text = str(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


def add_flags(parser: argparse._ActionsContainer, config: type, skip: Container[str] = ()) -> None:
    """Adds one flag a field of a dataclass: type from the default, help from the metadata."""
    for f in fields(config):
        if f.name not in skip:
            add_flag(parser, f, f.metadata.get("help", ""))


def add_flag(parser: argparse._ActionsContainer, f: Field[Any], text: str) -> None:
    """Adds the flag of a dataclass field, with `text` and the default as its help."""
    default: Any = f.default if f.default is not MISSING else None
    extra = {key: f.metadata[key] for key in ("choices", "metavar") if key in f.metadata}
    text = text.replace("%", "%%")
    if default not in (None, "") and "above" not in f.metadata:
        text += f" (default: {default})"
    if isinstance(default, bool):
        parser.add_argument(
            f"--{f.name}", action=argparse.BooleanOptionalAction, default=None, help=text
        )
    else:
        kind = number if isinstance(default, float) else type(default)
        parser.add_argument(
            f"--{f.name}", type=f.metadata.get("type", kind), default=None, help=text, **extra
        )


def number(text: str) -> float:
    """A finite float, for a flag; ValueError otherwise."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def from_flags(config: type, args: argparse.Namespace, file: dict[str, Any] | None = None) -> Any:
    """The dataclass: a flag that was given, else the config file's value, else the default."""
    values = {f.name: v for f in fields(config) if (v := (file or {}).get(f.name)) is not None}
    given = {f.name: v for f in fields(config) if (v := getattr(args, f.name, None)) is not None}
    return config(**{**values, **given})


def read_config_file(path: str) -> dict[str, Any]:
    """A JSON or TOML file of flag values, as a dict."""
    values = read_structured(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected an object of flag names and values")
    return values


def read_structured(path: str) -> Any:
    """What a JSON or TOML file holds."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        if not path.endswith(".toml"):
            return json.loads(text)
        return tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON or TOML file: {error}") from None


def yes_no(text: str) -> bool:
    """Parses true or false, for a flag; ValueError otherwise."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError(f"{text} is neither true nor false")
    return text.lower() in ("true", "1")


def int_list(text: str) -> tuple[int, ...]:
    """Parses '2,4' into (2, 4); an empty text is ()."""
    return tuple(int(part) for part in text.split(",") if part.strip())
