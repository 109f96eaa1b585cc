"""The files that ship: they run, can be trained on, and name no place."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np

import asr
from asr.checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "experiments" / "librispeech"


def test_files_that_ship(tiny_checkpoint, tmp_path, capsys):
    checkpoint = load_checkpoint(tiny_checkpoint)
    checkpoint.data = {"train": "/home/somebody/speech"}
    checkpoint.history = [
        {"step": "train", "config": {"epochs": 3, "fine_tune_data": "/home/somebody/more"}}
    ]
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    main = runpy.run_path(str(ROOT / "scripts" / "ship_model.py"))["main"]
    output = tmp_path / "ship"
    assert main(["--model_path", str(tmp_path / "model.pt"), "--output_dir", str(output)]) == 0
    assert "model_int8.onnx" in capsys.readouterr().out
    for path in output.iterdir():
        assert b"somebody" not in path.read_bytes()
    half = load_checkpoint(output / "model_fp16.pt")
    assert half.history[0] == {"step": "train", "config": {"epochs": 3}}
    assert not half.data
    size = (output / "model_fp16.pt").stat().st_size
    assert size < 0.7 * (tmp_path / "model.pt").stat().st_size
    silence = np.zeros(16000, np.float32)
    assert isinstance(asr.load(output / "model_int8.onnx").transcribe(silence), str)


def test_the_models_in_the_repository_name_no_place():
    for path in (SHIPPED / "model_fp16.pt", SHIPPED / "model_int8.onnx"):
        contents = path.read_bytes()
        for place in (b"/root/", b"/home/", b"/work/", b"/tmp/", b"C:\\"):
            assert place not in contents, f"{path}: {place!r}"
