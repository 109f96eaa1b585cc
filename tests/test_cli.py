"""Flags from dataclasses, config files, and one clear line for a mistake."""

import argparse
import errno
import os
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from asr.cli import (
    add_flags,
    describe,
    from_flags,
    guarded,
    int_list,
    read_config_file,
    read_structured,
)


@dataclass(frozen=True)
class Options:
    rate: float = field(default=0.5, metadata={"help": "how fast"})
    steps: int = 3
    mode: str = field(default="fast", metadata={"choices": ("fast", "slow")})
    compile: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--steps {self.steps} must be above 0")


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser, Options)
    return parser.parse_args(argv)


def test_no_flag_is_the_default():
    assert from_flags(Options, parse()) == Options()


def commands() -> list[Path]:
    root = Path(__file__).parents[1]
    return sorted([*root.glob("*.py"), *root.glob("scripts/*.py")])


@pytest.mark.parametrize("command", commands(), ids=lambda path: path.name)
def test_every_command_explains_itself(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(command), "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(command), run_name="__main__")
    assert exit.value.code in (0, None)
    assert "usage: " in capsys.readouterr().out


def test_flags_win_over_the_file_and_the_file_over_defaults():
    args = parse("--steps", "7", "--no-compile")
    file = {"steps": 5, "rate": 0.25, "compile": True, "elsewhere": 1}
    assert from_flags(Options, args, file) == Options(rate=0.25, steps=7, compile=False)


def test_flags_have_types_choices_and_checks(capsys):
    assert from_flags(Options, parse("--rate", "1e-3", "--compile")) == Options(1e-3, compile=True)
    for wrong in (["--steps", "x"], ["--mode", "odd"], ["--rate"], ["--rate", "nan"]):
        with pytest.raises(SystemExit) as stopped:
            parse(*wrong)
        assert stopped.value.code == 2
        assert wrong[0] in capsys.readouterr().err
    with pytest.raises(ValueError, match="--steps 0 must be above 0"):
        from_flags(Options, parse("--steps", "0"))


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("two\n  lines"), 2, "error: two lines"),
        (ValueError(), 2, "error: ValueError"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.pt"), 2,
         "error: a.pt: No space left on device"),
        (OSError("plain"), 2, "error: plain"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_a_code(error, code, line, capsys):
    def command():
        raise error

    assert guarded(command) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == line + "\n"


def test_our_own_errors_keep_their_traceback():
    def command():
        raise AssertionError("impossible")

    with pytest.raises(AssertionError):
        guarded(command)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_exit_codes(returned, code):
    assert guarded(lambda: returned) == code


def test_describe_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No such file") as caught:
        open(tmp_path / "absent")  # noqa: SIM115
    assert describe(caught.value) == f"{tmp_path}/absent: No such file or directory"


def test_config_files(tmp_path):
    json_file, toml_file = tmp_path / "a.json", tmp_path / "a.toml"
    json_file.write_text('{"steps": 5, "rate": 0.1}')
    toml_file.write_text("steps = 5\nrate = 0.1\n")
    assert read_config_file(str(json_file)) == {"steps": 5, "rate": 0.1}
    assert read_config_file(str(toml_file)) == {"steps": 5, "rate": 0.1}


@pytest.mark.parametrize("name", ["broken.json", "broken.toml"])
def test_a_broken_file_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_text("{steps: = 5")
    with pytest.raises(ValueError, match=f"{name}: not a JSON or TOML file"):
        read_structured(str(path))


def test_a_config_file_is_an_object(tmp_path):
    path = tmp_path / "list.json"
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="expected an object"):
        read_config_file(str(path))


@pytest.mark.parametrize(("text", "expected"), [("", ()), ("3", (3,)), ("2, 4,", (2, 4))])
def test_int_list(text, expected):
    assert int_list(text) == expected
