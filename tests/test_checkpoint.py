"""Checkpoints come back to the bit, are written whole or not at all, and never run code."""

import io
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

import compress
from asr.network import checkpoint as checkpoint_module
from asr.network.checkpoint import (
    VERSION,
    Checkpoint,
    CheckpointError,
    build_layer,
    checkpoint_contents,
    compress_module,
    layer_map,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from asr.network.model import ConformerCTC, FeedForward
from asr.runtime.config import FeatureConfig, ModelConfig
from asr.runtime.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]


def make_checkpoint(seed: int = 0, **changes) -> Checkpoint:
    torch.manual_seed(seed)
    config = ModelConfig(
        d_model=16, n_layers=2, n_heads=2, conv_kernel_size=7, subsampling_channels=4, **changes
    )
    model = ConformerCTC(config).eval()
    with torch.no_grad():
        model.blocks[0].conv.batch_norm.running_mean.normal_()
    return Checkpoint(
        model, Tokenizer.characters(), FeatureConfig(preemphasis=0.9), {"train": "./data"},
        [{"step": "train", "config": {"epochs": 3}, "dev_wer": 0.25}],
    )  # fmt: skip


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "model.pt"
    save_checkpoint(path, make_checkpoint())
    return path


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        x.dtype == right[k].dtype and torch.equal(x, right[k]) for k, x in left.items()
    )


def edit(path: Path, **changes) -> Path:
    """Rewrites a checkpoint with other contents; None takes a key away."""
    contents = torch.load(path, weights_only=True)
    for key, value in changes.items():
        if value is None:
            del contents[key]
        else:
            contents[key] = value
    torch.save(contents, path)
    return path


# ---- round trips ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"intermediate_layers": (1,), "self_conditioned": True},
                {"subsampling": "dw_striding", "subsampling_factor": 8}]
)  # fmt: skip
def test_round_trip_to_the_bit(tmp_path, changes):
    checkpoint = make_checkpoint(**changes)
    save_checkpoint(tmp_path / "a.pt", checkpoint)
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert same_bits(loaded.model, checkpoint.model)
    assert asdict(loaded.model.config) == asdict(checkpoint.model.config)
    assert loaded.tokenizer.tokens == checkpoint.tokenizer.tokens
    assert loaded.features == checkpoint.features
    assert loaded.data == checkpoint.data
    assert loaded.history == checkpoint.history
    assert loaded.training is None
    assert not loaded.model.training
    features = torch.randn(2, 30, 80)
    with torch.inference_mode():
        assert torch.equal(loaded.model(features).log_probs, checkpoint.model(features).log_probs)


def test_saving_again_gives_the_same_contents(saved, tmp_path):
    loaded = load_checkpoint(saved)
    save_checkpoint(tmp_path / "again.pt", loaded)
    first, again = read_checkpoint(saved), read_checkpoint(tmp_path / "again.pt")
    assert first.keys() == again.keys()
    assert all(first[key] == again[key] for key in first.keys() - {"model"})
    assert same_bits(load_checkpoint(tmp_path / "again.pt").model, loaded.model)


def test_the_resume_state_comes_back(tmp_path):
    checkpoint = make_checkpoint()
    checkpoint.training = {"step": 7, "optimizer": {"state": {0: torch.arange(3.0)}}, "log": []}
    save_checkpoint(tmp_path / "last.pt", checkpoint)
    training = load_checkpoint(tmp_path / "last.pt").training
    assert training is not None
    assert training["step"] == 7
    assert torch.equal(training["optimizer"]["state"][0], torch.arange(3.0))


def test_bpe_tokens_come_back(tmp_path):
    texts = ["the cat sat on the mat", "a dog ran to the door", "the end of the day"] * 3
    tokenizer = Tokenizer.bpe(texts, vocab_size=40)
    checkpoint = make_checkpoint(vocab_size=40)
    checkpoint.tokenizer = tokenizer
    save_checkpoint(tmp_path / "a.pt", checkpoint)
    loaded = load_checkpoint(tmp_path / "a.pt").tokenizer
    assert loaded.encode(texts[0]) == tokenizer.encode(texts[0])


def test_a_narrower_layer_needs_no_code(tmp_path):
    """Structured pruning: the map tells what differs from the config."""
    checkpoint = make_checkpoint()
    checkpoint.model.blocks[1].ff2 = FeedForward(16, 24, 0.1)
    checkpoint.model.blocks[0].ff1.up = nn.Linear(16, 64, bias=False)
    layers = layer_map(checkpoint.model.eval())
    assert set(layers) == {"blocks.0.ff1.up", "blocks.1.ff2"}
    save_checkpoint(tmp_path / "a.pt", checkpoint)
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert same_bits(loaded.model, checkpoint.model)
    assert layer_map(loaded.model) == layers


def test_a_plain_model_has_no_map():
    assert layer_map(make_checkpoint().model) == {}


# ---- files that cannot be used ----------------------------------------------------------------


def test_truncated_anywhere(saved):
    data = saved.read_bytes()
    for share in (0.0, 0.001, 0.1, 0.5, 0.9, 0.999):
        saved.write_bytes(data[: int(share * len(data))])
        with pytest.raises(CheckpointError, match=r"model\.pt: .*(unreadable|not a checkpoint)"):
            load_checkpoint(saved)


@pytest.mark.parametrize("data", [b"not a model at all\n", b"\x80\x02}q\x00.", bytes(1000)])
def test_other_files(tmp_path, data):
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.pt: "):
        load_checkpoint(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(tmp_path)


def test_an_export_is_told_from_a_checkpoint(tiny_onnx):
    with pytest.raises(CheckpointError, match=r"model\.onnx: an export is only run"):
        load_checkpoint(tiny_onnx)


def test_pytorch_files_of_another_kind(tmp_path):
    path = tmp_path / "model.pt"
    for other in ({"weight": torch.zeros(3)}, [1, 2], torch.zeros(2), {"version": 1}):
        torch.save(other, path)
        with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
            load_checkpoint(path)


@pytest.mark.parametrize("version", [VERSION + 1, 99])
def test_a_newer_version_says_so(saved, version):
    with pytest.raises(CheckpointError, match=f"newer version .format {version}.*update"):
        load_checkpoint(edit(saved, version=version))


@pytest.mark.parametrize("version", ["2", None, [1], 1.5, 0, True])
def test_a_version_that_is_none(saved, version):
    contents = torch.load(saved, weights_only=True) | {"version": version}
    torch.save(contents, saved)
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        load_checkpoint(saved)


@pytest.mark.parametrize("key", ["config", "tokens", "layers", "data", "history"])
def test_a_missing_key_is_named(saved, key):
    with pytest.raises(CheckpointError, match=key):
        load_checkpoint(edit(saved, **{key: None}))


def test_weights_must_fit_exactly(saved):
    state = torch.load(saved, weights_only=True)["model"]
    name = "blocks.0.ff1.up.weight"
    for wrong in (
        {k: v for k, v in state.items() if k != name},
        state | {"extra.weight": torch.zeros(1)},
        state | {name: torch.zeros(3, 3)},
        [1, 2],
    ):
        with pytest.raises(CheckpointError, match="not a usable checkpoint"):
            load_checkpoint(edit(saved, model=wrong))


def test_tokens_must_fit_the_output(saved):
    with pytest.raises(CheckpointError, match="3 tokens, but 29 outputs"):
        load_checkpoint(edit(saved, tokens=["<blk>", "a", "b"]))


LINEAR = {"in_features": 16, "out_features": 8, "bias": True}


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("blocks.0.ff1.up", {"layer": "Linear", "args": LINEAR}),  # other shape than the weights
        ("blocks.7.ff1.up", {"layer": "Linear", "args": LINEAR}),  # no such place
        ("blocks.0.ff1.up", {"layer": "nosuch.Layer", "args": {}}),
        ("blocks.0.ff1.up", {"layer": "quantization.NoSuchLayer", "args": {}}),
        ("blocks.0.ff1.up", {"layer": "quantization.torch", "args": {}}),
        ("blocks.0.ff1.up", {"layer": "model.subsampled_length", "args": {}}),
        ("blocks.0.ff1.up", {"layer": "os.system", "args": {"command": "true"}}),
        ("blocks.0.ff1.up", {"layer": "../evil.Layer", "args": {}}),
        ("blocks.0.ff1.up", {"layer": "Linear", "args": {"wrong": 1}}),
        ("blocks.0.ff1.up", {"layer": "Linear"}),
        ("blocks.0.ff1.up", "Linear"),
    ],
)  # fmt: skip
def test_a_wrong_layer_map_is_refused(saved, name, entry):
    with pytest.raises(CheckpointError, match="not a usable checkpoint"):
        load_checkpoint(edit(saved, layers={name: entry}))


def test_layers_come_from_the_model_or_from_compress_only():
    assert isinstance(build_layer("Linear", LINEAR), nn.Linear)
    args = {"d_model": 8, "hidden": 4, "dropout": 0.0}
    assert isinstance(build_layer("model.FeedForward", args), FeedForward)
    for name in ("torch.Module", "nn.Linear", "model.nn", "model.Any", "", "."):
        with pytest.raises(CheckpointError, match="unknown layer"):
            build_layer(name, {})


def test_a_file_written_before_methods_were_folders_loads():
    """Its layers have the names of then; the model says what it said then."""
    path = ROOT / "tests" / "data" / "before_the_rooms.pt"
    written = {entry["layer"] for entry in read_checkpoint(path)["layers"].values()}
    assert {"quantized.Int8Linear", "quantized.QuantLinear", "quantized.Int8Conv"} <= written
    model = load_checkpoint(path).model
    features = torch.sin(torch.arange(50 * 80).view(1, 50, 80) * 0.37)
    with torch.no_grad():
        log_probs = model(features).log_probs
    expected = torch.tensor([-4.0511, -3.6010, -4.0500, -3.1321])
    torch.testing.assert_close(log_probs[0, 5, :4], expected, atol=1e-3, rtol=0)
    now = {entry["layer"].partition(".")[0] for entry in layer_map(model).values()}
    assert now == {"quantization", "clustering", "factorization", "model"}


def test_modules_of_layers_keep_their_constants(tmp_path, monkeypatch):
    """Loading builds on the meta device, where tensors have no data; imports must not."""
    (tmp_path / "probe.py").write_text("import torch\nvalues = torch.ones(2).tolist()\n")
    monkeypatch.setattr(compress, "__path__", [*compress.__path__, str(tmp_path)])
    with torch.device("meta"):
        assert compress_module("probe").values == [1, 1]
    monkeypatch.delitem(sys.modules, "compress.probe")


class Evil:
    """Pickled, it asks the reader to make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("how", ["pickle", "torch.save", "inside a checkpoint"])
def test_code_in_a_file_is_never_run(saved, tmp_path, how):
    evil = Evil(tmp_path / "was-run")
    if how == "pickle":
        saved.write_bytes(pickle.dumps(evil))
    elif how == "torch.save":
        torch.save(evil, saved)
    else:
        edit(saved, history=[evil])
    with pytest.raises(CheckpointError, match="unsafe to load"):
        load_checkpoint(saved)
    assert not evil.marker.exists()
    if how == "pickle":
        pickle.loads(saved.read_bytes())  # the trap itself works
        assert evil.marker.exists()


# ---- writing ----------------------------------------------------------------------------------


def test_folders_are_made(tmp_path):
    save_checkpoint(tmp_path / "a" / "b" / "model.pt", make_checkpoint())
    assert load_checkpoint(tmp_path / "a" / "b" / "model.pt").history


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), RuntimeError("zip")])
def test_a_failed_save_leaves_the_old_file(saved, monkeypatch, error):
    before = saved.read_bytes()

    def fail(contents, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(checkpoint_module.torch, "save", fail)
    with pytest.raises((OSError, KeyboardInterrupt)):
        save_checkpoint(saved, make_checkpoint(seed=1))
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_full_disk_is_one_line_and_code_2(saved):
    """RLIMIT_FSIZE stands for the full disk; another process, since the limit is for good."""
    before = saved.read_bytes()
    program = """
import resource, sys
from asr.network.checkpoint import load_checkpoint, save_checkpoint
from asr.runtime.cli import guarded
checkpoint = load_checkpoint(sys.argv[1])
checkpoint.history.append({"step": "second"})
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
sys.exit(guarded(lambda: save_checkpoint(sys.argv[1], checkpoint)))
"""
    out = subprocess.run(
        [sys.executable, "-c", program, str(saved)], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 2
    assert out.stderr.startswith("error: ")
    assert out.stderr.count("\n") == 1
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_killed_while_saving_the_file_is_whole(tmp_path):
    path = tmp_path / "model.pt"
    program = """
import sys
from tests.test_checkpoint import make_checkpoint
from asr.network.checkpoint import save_checkpoint
checkpoint = make_checkpoint()
while True:
    save_checkpoint(sys.argv[1], checkpoint)
"""
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        for _ in range(20):  # always whole for a reader beside it
            assert load_checkpoint(path).history
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert same_bits(load_checkpoint(path).model, make_checkpoint().model)


def test_a_name_that_is_taken_by_a_folder(tmp_path):
    (tmp_path / "model.pt").mkdir()
    with pytest.raises(OSError, match="directory"):
        save_checkpoint(tmp_path / "model.pt", make_checkpoint())
    assert os.listdir(tmp_path) == ["model.pt"]


def test_contents_are_plain(tmp_path):
    buffer = io.BytesIO()
    torch.save(checkpoint_contents(make_checkpoint()), buffer)
    buffer.seek(0)
    contents = torch.load(buffer, weights_only=True)
    assert contents["version"] == VERSION
    assert set(contents) == {
        "version", "config", "tokens", "sentencepiece_model", "layers", "data", "history", "model"
    }  # fmt: skip
