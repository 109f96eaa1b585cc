"""The pages: their links lead somewhere, and every command in them is one that its parser takes."""

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "data").glob("*.md")), *sorted((ROOT / "experiments").rglob("*.md")),
    ROOT / "scripts" / "README.md",
]  # fmt: skip
HOME = {
    "train.py": "asr.training.train", "compress.py": "compress.cli",
    "evaluate.py": "asr.measure.evaluate", "transcribe.py": "asr.runtime.transcribe",
    "asr-transcribe": "asr.runtime.transcribe",
}  # fmt: skip


def named(paths):
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


def shell_lines(page: Path) -> Iterator[str]:
    """The lines of a page's shell blocks, continued ones joined."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Module and arguments of each call of one of our commands."""
    for line in shell_lines(page):
        for part in re.split(r"&&|;|\|", line.replace("<(", "(")):
            words = shlex.split(part, comments=True)
            for at, word in enumerate(words):
                name = word.removeprefix("./").rpartition("bin/")[2]
                if word.endswith(".py") or name in HOME:
                    yield (
                        HOME.get(name, name.removesuffix(".py").replace("/", ".")),
                        words[at + 1 :],
                    )
                    break


@pytest.mark.parametrize("page", named(page for page in PAGES if [*commands(page)]))
def test_commands_are_ones_that_their_parsers_take(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for module, arguments in commands(page):
        if any("$" in argument for argument in arguments):
            continue  # settings of a shell variable
        parsed = import_module(module).parse_args(arguments)
        assert vars(parsed), (module, arguments)


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_first_page_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
