"""A model with a time reduction through the whole toolkit: files, export, compression, training."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest

import asr
from asr.network.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from asr.network.export import to_onnx
from asr.network.model import ConformerCTC
from asr.runtime.config import ModelConfig
from asr.runtime.tokenizer import Tokenizer
from asr.training.start import check_front
from asr.training.train import main as train
from compress import core, recipes
from tests.corpus import write_corpus

ALPHABET = "abc"
CONFIG = ModelConfig(
    vocab_size=len(Tokenizer.characters(ALPHABET)), d_model=16, n_layers=4, n_heads=2,
    conv_kernel_size=5, subsampling_factor=2, subsampling_channels=4, reduction_position=2,
    reduction_factor=2, reduction_d_model=32, plain_blocks=2, intermediate_layers=(3,),
    self_conditioned=True, dropout=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint with random weights."""
    path = tmp_path_factory.mktemp("reduced") / "start.pt"
    model = ConformerCTC(CONFIG).eval()
    save_checkpoint(path, Checkpoint(model, Tokenizer.characters(ALPHABET)))
    return path


@pytest.mark.parametrize("method", ["none", "int8", "structured", "low_rank"])
def test_the_file_says_the_total_factor_and_computes_the_same(start, method, tmp_path):
    steps = {
        "none": [],
        "int8": [recipes.make_step("quantization", {"precision": "int8"})],
        "structured": [
            recipes.make_step("pruning", {"pruning_type": "structured", "sparsity": 0.3})
        ],
        "low_rank": [recipes.make_step("factorization", {"rank": 4})],
    }[method]
    checkpoint = core.run(load_checkpoint(start), steps)
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    to_onnx(load_checkpoint(tmp_path / "model.pt"), tmp_path / "model.onnx")  # checks parity
    metadata = {p.key: p.value for p in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert metadata["subsampling_factor"] == "4"
    assert json.loads(metadata["asr"])["subsampling_factor"] == 4
    waveform = np.random.default_rng(0).standard_normal(16000).astype("f4") * 0.1
    file = asr.load(tmp_path / "model.onnx")
    assert len(file.waveform_log_probs(waveform)) == 26  # ceil(101 / 4)


def run(start, tmp_path, *more):
    data = write_corpus(tmp_path / "data", 2)
    flags = [
        "--init_from", start, "--data_dir", data, "--output_dir", tmp_path / "run",
        "--warmup_steps", 1, "--num_workers", 0, "--no-tensorboard", "--freeze_blocks", 2,
        "--log_every", 1, *more,
    ]  # fmt: skip
    assert train([str(flag) for flag in flags]) == 0
    return tmp_path / "run"


def changed(before, after, prefix):
    """Whether any tensor whose name begins so differs."""
    one, two = (load_checkpoint(path).model.state_dict() for path in (before, after))
    names = [name for name in one if name.startswith(prefix)]
    assert names
    return any(not np.array_equal(one[n].numpy(), two[n].numpy()) for n in names)


def test_a_frozen_front_stays_and_is_heard_once(start, tmp_path):
    folder = run(start, tmp_path, "--epochs", 2, "--freeze_epochs", 2, "--ema", 0)
    for part in ("subsampling", "blocks.0", "blocks.1"):
        assert not changed(start, folder / "last.pt", part)
    for part in ("reduction", "blocks.2", "blocks.3", "head"):
        assert changed(start, folder / "last.pt", part)
    heard = list((folder / "front").glob("*.npy"))
    assert len(heard) == len(set(heard)) > 0


def test_a_front_that_thaws_learns_but_keeps_its_statistics(start, tmp_path):
    folder = run(start, tmp_path, "--epochs", 2, "--freeze_epochs", 1, "--ema", 0)
    assert changed(start, folder / "last.pt", "blocks.0.ff1")
    assert not changed(start, folder / "last.pt", "blocks.0.conv.batch_norm.running")
    more = run(start, tmp_path, "--epochs", 3, "--freeze_epochs", 1, "--ema", 0, "--resume")
    log = [json.loads(line) for line in (more / "log.jsonl").read_text().splitlines()]
    assert max(entry["epoch"] for entry in log) == 3  # more epochs than first planned


def test_a_front_of_another_rate_is_refused(tmp_path, tiny_checkpoint, capsys):
    data = write_corpus(tmp_path / "data", 1)
    flags = ["--init_from", tiny_checkpoint, "--data_dir", data, "--output_dir", tmp_path / "run"]
    assert train([str(flag) for flag in (*flags, "--freeze_blocks", 1)]) == 2
    assert "subsampling_factor is 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "n", "why"),
    [
        ({}, 3, "the model merges frames after block 2: at most 2"),
        ({"reduction_position": 0, "reduction_factor": 1, "reduction_d_model": 0}, 3,
         "the model feeds its output back after block 3: at most 2"),
        ({"reduction_position": 0, "reduction_factor": 1, "reduction_d_model": 0,
          "intermediate_layers": (), "self_conditioned": False}, 5, "the model has 4 blocks"),
    ],
)  # fmt: skip
def test_a_front_that_is_heard_at_another_rate_or_learns_is_refused(changes, n, why):
    config = replace(CONFIG, **changes)
    for allowed in range(n):
        check_front(config, allowed)
    with pytest.raises(ValueError, match=why):
        check_front(config, n)


def test_what_another_front_has_made_is_not_heard(start, tmp_path):
    """A run that was killed before its first state leaves what its front made."""
    cache = tmp_path / "run" / "front"
    cache.mkdir(parents=True)
    np.save(cache / "0.npy", np.full((30, 16), np.nan, np.float16))
    folder = run(start, tmp_path, "--epochs", 2, "--freeze_epochs", 1, "--ema", 0)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(entry.get("skipped", 0) == 0 for entry in log)
    assert not list(cache.iterdir())  # the front has learnt since


@pytest.mark.parametrize("flag", ["freeze_epochs 1", "teacher_block 2", "teacher_output x"])
def test_flags_that_say_nothing_alone_are_refused(start, tmp_path, capsys, flag):
    data = write_corpus(tmp_path / "data", 1)
    flags = f"--init_from {start} --data_dir {data} --output_dir {tmp_path / 'run'} --{flag}"
    assert train(flags.split()) == 2
    assert f"--{flag} goes with --" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
