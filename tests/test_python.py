"""The functions behind the commands: `import asr` is light, and the page about them is true."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch

import asr
import compress
from asr.network.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from compress import core, recipes
from compress.cli import parse_args
from tests.corpus import tone_waveform, write_corpus

ROOT = Path(__file__).resolve().parents[1]


def test_importing_loads_nothing_heavy():
    program = (
        "import sys, asr, compress; "
        "print(*{'torch', 'onnxruntime', 'onnx', 'soundfile', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_the_page_about_python_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    corpus = write_corpus(tmp_path / "my_recordings")
    (corpus / "test.json").write_text((corpus / "dev.json").read_text())
    soundfile.write(tmp_path / "recording.wav", tone_waveform("abc"), 16000)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) >= 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert names["trained"].finished
    assert names["small"].bytes_after < 0.5 * names["small"].bytes_before
    assert names["after"]["model"].endswith("model.onnx")
    printed = capsys.readouterr().out
    assert re.search(r"WER \d+\.\d%, as int8 \d+\.\d%", printed)
    for name in re.findall(r"`(\w+\.\w+)\(", page):
        module, function = name.split(".")
        assert callable(getattr(names[module], function))


def test_evaluate_says_what_the_command_writes(tiny_checkpoint, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    first = asr.evaluate(tiny_checkpoint, corpus / "dev.json", speed=False, limit=2)
    assert [len(first["utterances"]), "speed" in first, "sets" in first] == [2, False, False]
    both = asr.evaluate(
        tiny_checkpoint, [corpus / "dev.json", corpus / "train.json"], speed=False, limit=2
    )
    assert [part["utterances"] for part in both["sets"]] == [2, 2]
    assert both["utterances"][:2] == first["utterances"]
    with pytest.raises(ValueError, match="no_such"):
        asr.evaluate(tiny_checkpoint, "no_such")


def test_settings_that_do_not_exist_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such setting of training: epoch, lr"):
        asr.train("nowhere", tmp_path / "run", epoch=3, lr=1.0)
    with pytest.raises(ValueError, match="must end in"):
        asr.export_onnx("model.pt", tmp_path / "model.bin")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["blocks.1.ff1.up.weight", "blocks.0.conv.batch_norm.running_var"])
def test_weights_that_are_not_finite_are_refused_with_their_layer(
    tiny_checkpoint, tmp_path, value, name
):
    checkpoint = load_checkpoint(tiny_checkpoint)
    checkpoint.model.state_dict()[name].view(-1)[3] = value
    save_checkpoint(tmp_path / "bad.pt", checkpoint)
    layer = name.rpartition(".")[0]
    with pytest.raises(CheckpointError, match=rf"layer {re.escape(layer)}: 1 of \d+ numbers"):
        asr.export_onnx(tmp_path / "bad.pt", tmp_path / "bad.onnx")
    with pytest.raises(CheckpointError, match=rf"layer {re.escape(layer)}: 1 of \d+ numbers"):
        core.run(load_checkpoint(tmp_path / "bad.pt"), [recipes.make_step("quantization", {})])
    assert not (tmp_path / "bad.onnx").exists()
    assert torch.isfinite(load_checkpoint(tiny_checkpoint).model.state_dict()[name]).all()


def test_a_compression_is_checked_and_says_its_command(tiny_checkpoint, tmp_path, monkeypatch):
    for settings, message in (
        ({}, "give either --method"),
        ({"method": "nothing"}, "unknown method 'nothing'"),
        ({"method": "quantization", "precison": "int8"}, "unknown option 'precison'"),
        ({"recipe": "r.json", "precision": "int8"}, "--precision goes with --method"),
        ({"method": "quantization", "sensitivity": "scan.json"}, "--sensitivity goes with"),
        ({"method": "quantization", "threads": -1}, "--threads -1"),
    ):
        with pytest.raises(ValueError, match=message):
            compress.compress(tiny_checkpoint, tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="--output_dir is needed"):
        compress.compress(tiny_checkpoint, method="quantization")
    dry = compress.compress(tiny_checkpoint, method="quantization", dry_run=True)
    made = compress.compress(
        tiny_checkpoint, tmp_path / "out", method="quantization", exclude="head", asymmetric=True
    )
    assert dry.model_path is None
    assert made.model_path == tmp_path / "out" / "model.pt"
    assert dry.bytes_after < made.bytes_after < made.bytes_before
    monkeypatch.chdir(tmp_path)
    again = shlex.split(made.report["command"])
    assert again[:2] == ["python", "compress.py"]
    asked = vars(parse_args(again[2:]))
    assert [asked[name] for name in ("exclude", "asymmetric")] == ["head", True]
