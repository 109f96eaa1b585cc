"""The manners of every command: its help, its version, one line for a mistake, where it starts."""

import argparse
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from asr import __version__
from asr.runtime.cli import Parser

ROOT = Path(__file__).resolve().parents[1]


def commands() -> list[Path]:
    return sorted(path for part in ("", "scripts/", "experiments/", "data/")
                  for path in ROOT.glob(f"{part}*.py"))  # fmt: skip


def call(command: Path, monkeypatch, *arguments: str) -> int | str | None:
    """The exit code of a command's file, run in this process."""
    monkeypatch.setattr(sys, "argv", [str(command), *arguments])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(command), run_name="__main__")
    return exit.value.code


def options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Those of a parser and its subcommands."""
    own = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    inner = [action.choices for action in own if action.nargs == argparse.PARSER]
    return own + [action for part in inner for p in part.values() for action in options(p)]


@pytest.mark.parametrize("command", commands(), ids=lambda path: path.name)
def test_every_command_explains_itself_and_its_options(command, monkeypatch, capsys):
    parsers = []

    def keep(self, *arguments):
        parsers.append(self)
        return argparse.ArgumentParser.parse_args(self, *arguments)

    monkeypatch.setattr(Parser, "parse_args", keep)
    assert call(command, monkeypatch, "--help") in (0, None)
    purpose, _, rest = capsys.readouterr().out.partition("usage: ")
    assert re.match(r"[A-Z][a-z]+s .*[.:]\n", purpose), "what it does comes first, in one line"
    assert rest.startswith(command.name)
    (parser,) = parsers
    unexplained = [action.dest for action in options(parser) if not action.help]
    assert not unexplained
    outputs = [flag for action in options(parser) for flag in action.option_strings
               if flag.startswith("--out")]  # fmt: skip
    kept = {
        "evaluate.py": ["--output_file"], "transcribe.py": ["--output_text", "--output_format"],
    }  # fmt: skip
    assert set(outputs) <= {"--output_dir", "--output_path", *kept.get(command.name, [])}


@pytest.mark.parametrize("command", commands(), ids=lambda path: path.name)
def test_every_command_has_a_version_and_one_line_for_a_mistake(command, monkeypatch, capsys):
    assert call(command, monkeypatch, "--version") in (0, None)
    assert __version__ in capsys.readouterr().out
    assert call(command, monkeypatch, "--no_such_flag") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["train.py", "compress.py", "evaluate.py", "transcribe.py"])
def test_commands_start_where_python_adds_no_folder_to_its_path(command, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(ROOT / command), "--version"], cwd=tmp_path, capture_output=True,
        env=environment | {"PYTHONSAFEPATH": "1"}, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_list_of_scripts_has_each_once():
    listed = re.findall(r"^\| \[(\S+)\]\(\1\) \| ", (ROOT / "scripts/README.md").read_text(), re.M)
    there = {path.name for path in (ROOT / "scripts").iterdir() if path.suffix in (".py", ".sh")}
    assert sorted(listed) == sorted(there)
