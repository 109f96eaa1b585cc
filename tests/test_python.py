"""The functions behind the commands: `import asr` is light, and the page about them is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import asr
from asr.network.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from compress import core
from tests.corpus import write_corpus

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
        core.run(load_checkpoint(tmp_path / "bad.pt"), [core.make_step("quantization", {})])
    assert not (tmp_path / "bad.onnx").exists()
    assert torch.isfinite(load_checkpoint(tiny_checkpoint).model.state_dict()[name]).all()
