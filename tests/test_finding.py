"""Which files of a folder are recordings."""

import os
from pathlib import Path

import pytest

from asr.runtime.finding import find_audio


def make(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"audio")


def test_links_are_followed_and_loops_are_not(tmp_path):
    folder, other = tmp_path / "folder", tmp_path / "other"
    make(folder / "b.wav", folder / "deep" / "a.FLAC", other / "c.opus", other / "notes.txt")
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "link").symlink_to(other)
    (folder / "again").symlink_to(other)
    (folder / "gone.wav").symlink_to("nowhere")
    names = [str(p.relative_to(folder)) for p in find_audio([str(folder)])]
    assert names == ["again/c.opus", "b.wav", "deep/a.FLAC"]


def test_what_is_hidden_is_passed_over_and_m4a_is_named(tmp_path):
    hidden = ("._a.wav", ".DS_Store", ".cache/a.wav", ".b.flac")
    make(*(tmp_path / name for name in (*hidden, "a.m4a", "a.oga", "b.aac")))
    (tmp_path / "folder.wav").mkdir()
    assert [p.name for p in find_audio([str(tmp_path)])] == ["a.m4a", "a.oga", "b.aac"]
    assert find_audio([str(tmp_path / ".b.flac")]) == [tmp_path / ".b.flac"]  # by its name


def test_names_that_are_no_utf8_are_found(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav"))
    make(path)
    assert find_audio([str(tmp_path)]) == [path]


def test_a_folder_without_audio_is_named(tmp_path):
    make(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"no audio in this folder \(.*\.m4a"):
        find_audio([str(tmp_path)])
