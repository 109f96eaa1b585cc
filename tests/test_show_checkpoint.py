"""scripts/show_checkpoint.py: every byte of the weights has its row."""

import re
from importlib import import_module

import pytest
import torch

from asr.network.checkpoint import Checkpoint, layer_map, load_checkpoint, save_checkpoint
from asr.network.model import ConformerCTC, count_parameters
from asr.runtime.config import ModelConfig
from asr.runtime.tokenizer import Tokenizer
from compress import core, recipes

show = import_module("scripts.show_checkpoint")

SECTIONS = ["blocks.*.ff1", "blocks.*.attn", "blocks.*.conv", "blocks.*.ff2", "blocks.*.norm",
            "subsampling", "head", "all"]  # fmt: skip


@pytest.fixture
def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    model = ConformerCTC(
        ModelConfig(d_model=16, n_layers=2, n_heads=2, conv_kernel_size=7, subsampling_channels=4)
    )
    return Checkpoint(
        model, Tokenizer.characters(), data={"train": "./speech"},
        history=[{"step": "train", "config": {"epochs": 3, "seed": 0}, "dev_wer": 0.123456789}],
    )  # fmt: skip


def rows_of(text: str) -> dict[str, tuple[int, int, float]]:
    """Weights, bytes and percent of each component in the printed table."""
    found = re.findall(r"^  (\S+) +([\d,]+) +([\d,]+) +([\d.]+)%", text, re.MULTILINE)
    return {
        name: (int(weights.replace(",", "")), int(size.replace(",", "")), float(share))
        for name, weights, size, share in found
    }


def test_a_float_model(checkpoint, tmp_path, capsys):
    path = tmp_path / "model.pt"
    save_checkpoint(path, checkpoint)
    assert show.main([str(path)]) == 0
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert sorted(rows) == sorted(SECTIONS)
    state = checkpoint.model.state_dict()
    assert rows["all"][:2] == (count_parameters(checkpoint.model), sum(
        x.nbytes for x in state.values()))  # fmt: skip
    ff1 = [x for name, x in state.items() if ".ff1." in name]
    assert rows["blocks.*.ff1"][:2] == (sum(x.numel() for x in ff1), sum(x.nbytes for x in ff1))
    parts = [row for name, row in rows.items() if name != "all"]
    assert sum(row[1] for row in parts) == rows["all"][1]
    assert sum(row[2] for row in parts) == pytest.approx(100, abs=0.4)
    for words in ("d_model 16", "n_mels 80", "./speech", "1. train:", "dev_wer 0.123457",
                  "epochs 3", "29 characters", "float32 100%"):  # fmt: skip
        assert words in text
    assert f"{path.stat().st_size:,} bytes" in text
    assert "compression" not in text


def test_a_compressed_model(checkpoint, tmp_path, capsys):
    steps = [recipes.make_step("quantization", {})]
    save_checkpoint(tmp_path / "small.pt", core.run(checkpoint, steps))
    assert show.main([str(tmp_path / "small.pt")]) == 0
    text = capsys.readouterr().out
    assert "layers put in by compression" in text
    loaded = load_checkpoint(tmp_path / "small.pt").model
    kinds = {entry["layer"] for entry in layer_map(loaded).values()}
    assert all(kind in text for kind in kinds)
    assert "2. quantization" in text
    assert "bit" in text
    rows = rows_of(text)
    contents = torch.load(tmp_path / "small.pt", weights_only=True)["model"]
    assert rows["all"][1] == contents["bytes"].numel()
    assert rows["all"][0] == count_parameters(
        ConformerCTC(loaded.config)
    )  # a packed weight still counts as a weight


def test_a_resume_state_is_told_apart(checkpoint, tmp_path, capsys):
    checkpoint.training = {"optimizer": {"state": [torch.zeros(1000)]}, "step": 3}
    save_checkpoint(tmp_path / "last.pt", checkpoint)
    assert show.main([str(tmp_path / "last.pt")]) == 0
    assert "resume state: 4,000 bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"dtype": "float32"}, "float32"), ({"half": True}, "fp16"),
        ({"low": 0, "base": 16}, "4-bit"), ({"low": -1, "base": 3}, "ternary"),
        ({"low": 0, "base": 2, "survivors": 5}, "1-bit sparse"), ({"low": 0, "bits": 7}, "7-bit"),
        ({"low": 0, "deflate": True}, "Huffman"), ({"half": True, "survivors": 2}, "fp16 sparse"),
    ],
)  # fmt: skip
def test_names_of_storage(info, expected):
    assert show.storage(info) == expected


def test_files_that_are_none(tmp_path, capsys):
    (tmp_path / "text.pt").write_text("nothing")
    for path in (tmp_path / "absent.pt", tmp_path, tmp_path / "text.pt"):
        assert show.main([str(path)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert str(path) in err
