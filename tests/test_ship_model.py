"""The files that ship: they run, can be trained on, stay small, and name no place."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest

import asr
from asr.common.metrics import word_counts
from asr.corpus.manifest import read_manifest
from asr.network.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from asr.runtime.transcribe import main as transcribe

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "experiments" / "english"
MOST_BYTES = 45_000_000
FOLDERS = "root|home|tmp|work|Users|mnt|opt"
PLACE = re.compile(rf"(?<![\w./])/(?:{FOLDERS})\b|(?<![A-Za-z])[A-Za-z]:\\\\")  # \\ in JSON is \


def test_files_that_ship(tiny_checkpoint, tmp_path, capsys):
    checkpoint = load_checkpoint(tiny_checkpoint)
    checkpoint.data = {"train": "/home/somebody/speech"}
    place = "/home/somebody/more"
    checkpoint.history = [
        {
            "step": "train",
            "config": {"epochs": 3, "fine_tune_data": place, "steps": [{"rank": 4, "data": place}]},
            "data": ["a", place, {"path": r"C:\somebody", place: 1}],
        }
    ]
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    main = runpy.run_path(str(ROOT / "experiments" / "ship_model.py"))["main"]
    output = tmp_path / "ship"
    assert main(["--model_path", str(tmp_path / "model.pt"), "--output_dir", str(output)]) == 0
    assert "model_int8.onnx" in capsys.readouterr().out
    for path in output.iterdir():
        assert b"somebody" not in path.read_bytes()
    half = load_checkpoint(output / "model_fp16.pt")
    config = {"epochs": 3, "steps": [{"rank": 4}]}
    assert half.history[0] == {"step": "train", "config": config, "data": ["a", {}]}
    assert not half.data
    size = (output / "model_fp16.pt").stat().st_size
    assert size < 0.7 * (tmp_path / "model.pt").stat().st_size
    silence = np.zeros(16000, np.float32)
    assert isinstance(asr.load(output / "model_int8.onnx").transcribe(silence).text, str)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/root/x", True), ('"/home/a"', True), ("in /tmp.", True), ("=/work/main", True),
        ("`/Users/a`", True), (json.dumps("C:\\speech"), True), ("../shared/an4", False),
        ("runs/work/a.json", False), ("and/or/home", False), ("https://a.org/opt/b", False),
        (json.dumps("said:\n"), False), ("/options", False),
    ],
)  # fmt: skip
def test_what_counts_as_a_place(text, found):
    assert bool(PLACE.search(text)) == found


def tracked(folder: Path) -> list[Path]:
    """The files below a folder that git keeps."""
    command = ["git", "-C", str(folder), "ls-files", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.split("\0") if name and (path := folder / name).is_file()]


def test_no_text_of_the_experiments_names_a_place():
    kinds = (".json", ".jsonl", ".txt", ".md")
    texts = [path for path in tracked(ROOT / "experiments") if path.suffix in kinds]
    assert texts
    named = [(path, m[0]) for path in texts if (m := PLACE.search(path.read_text("utf-8")))]
    assert not named


def test_the_models_that_ship_name_no_place():
    checkpoint = read_checkpoint(SHIPPED / "model_fp16.pt")
    about = json.dumps({k: v for k, v in checkpoint.items() if k != "model"}, default=str)
    assert not PLACE.search(about)
    assert not PLACE.search(json.dumps(metadata()))
    for path in (SHIPPED / "model_fp16.pt", SHIPPED / "model_int8.onnx"):
        assert not re.search(rf"/(?:{FOLDERS})/".encode(), path.read_bytes()), path


def metadata() -> dict[str, str]:
    """What the shipped .onnx says of itself."""
    return {p.key: p.value for p in onnx.load(SHIPPED / "model_int8.onnx").metadata_props}


def test_the_files_that_ship_are_small():
    assert sum(path.stat().st_size for path in tracked(SHIPPED)) <= MOST_BYTES


def test_the_tokens_that_ship_are_those_of_the_model():
    tokens = json.loads(metadata()["asr"])["tokens"]
    lines = (SHIPPED / "tokens.txt").read_text("utf-8").splitlines()
    assert lines == [f"{token} {i}" for i, token in enumerate(tokens)]


def test_the_model_that_ships_reads_the_built_in_corpus(capsys):
    """Half the words at least, without a --model_path."""
    first = read_manifest(ROOT / "data" / "mini" / "test.json")[0]
    assert first.audio_filepath.endswith("test/af_bella/0000.opus")
    assert transcribe(["--audio_path", first.audio_filepath, "--threads", "1"]) == 0
    *errors, words = word_counts(first.text, capsys.readouterr().out.strip())
    assert sum(errors) <= words / 2
