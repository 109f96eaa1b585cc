"""The mix of settings that runs in a given time, from times that a test can know."""

import copy
import json
import re

import numpy as np
import onnx_ir
import pytest
import torch

from asr.network.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from asr.network.export import as_exported
from asr.network.model import ConformerCTC
from asr.network.onnx_graph import EXAMPLE, part_graph, tensors_of
from asr.runtime.backends import open_session
from asr.runtime.config import ModelConfig
from asr.runtime.tokenizer import Tokenizer
from compress import calibration, cli, latency, mixing, sensitivity, settings
from tests.corpus import write_corpus

NARROW = "pruning:pruning_type=structured,sparsity=0.5"
TRIED = [settings.INT8, settings.TERNARY, f"{NARROW}+{settings.INT8}"]
REST = 40.0  # ms of what is in no row


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def checkpoint(corpus):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=5, d_model=32, n_layers=4, n_heads=2, conv_kernel_size=7,
        subsampling_channels=8, share_layers=2, reduction_position=0,
    )  # fmt: skip
    model = ConformerCTC(config).eval()
    return Checkpoint(model, Tokenizer.characters("abc"), data={"train": str(corpus)})


@pytest.fixture(scope="module")
def found(checkpoint):
    speech = calibration.load(checkpoint, most=4)
    return sensitivity.scan(checkpoint, TRIED, speech, by="module")


def kilobytes(part, *_):
    """In place of `milliseconds`: a time that follows from a part's shapes and types."""
    return sum(x.nbytes for x in tensors_of(part).values()) / 1000


def whole(checkpoint):
    """In place of `latency`: the rest, and every row as often as it runs."""
    model = checkpoint.model
    rows = sensitivity.units(model, "module") if plain(model) else NAMES
    turns = {"blocks": 2}
    return REST + sum(
        turns.get(name.split(".")[0], 1) * kilobytes(as_exported(model.get_submodule(name)))
        for name in rows
    )


PARTS = ("ff1", "attn", "conv", "ff2")
NAMES = ["subsampling", *(f"blocks.{i}.{part}" for i in (0, 1) for part in PARTS), "head"]


def plain(model):
    return all(type(m) is torch.nn.Linear for n, m in model.named_modules() if n.endswith(".up"))


@pytest.fixture(scope="module")
def measured(checkpoint, found):
    """The scan with times, and the parts that were timed for it with their calls."""
    parts = []

    def milliseconds(part, example, call):
        parts.append((part, call))
        return kilobytes(part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "milliseconds", milliseconds)
        patch.setattr(latency, "latency", whole)
        return latency.add_times(checkpoint, found, None), parts


@pytest.fixture
def timed(measured):
    return measured[0]


def test_equal_parts_are_timed_once_and_count_for_every_turn(measured):
    timed, parts = measured
    rows = {row["name"]: row for row in timed["layers"]}
    assert sorted(rows) == sorted(NAMES)
    shapes = {str([(n, x.dtype, x.shape) for n, x in tensors_of(p).items()]) for p, _ in parts}
    assert len(parts) == len(shapes)  # ff1 and ff2 of both blocks among them
    assert {x[0].shape[1] for _, x in parts} == {1001, 251}  # 10 s, and behind the subsampling
    assert rows["blocks.0.ff1"]["ms"] == rows["blocks.1.ff2"]["ms"]
    up, down, norm = 4 * (32 * 128 + 128), 4 * (128 * 32 + 32), 4 * 64
    assert rows["blocks.0.ff1"]["ms"] == pytest.approx(2 * (up + down + norm) / 1000)
    assert rows["head"]["ms"] == pytest.approx(4 * (32 * 5 + 5) / 1000)
    int8, ternary, narrow = (rows["blocks.0.ff1"]["settings"][text]["ms"] for text in TRIED)
    assert narrow < int8 < rows["blocks.0.ff1"]["ms"] / 3
    assert ternary < rows["blocks.0.ff1"]["ms"]


def test_a_part_computes_what_the_module_does(checkpoint, tmp_path):
    """With the shapes that it is called with, also those of a packed layer in a module."""
    step = settings.parse_setting(settings.INT8)
    model = sensitivity.apply(copy.deepcopy(checkpoint.model), step, None)
    names = ["subsampling", "blocks.1.attn", "blocks.0.ff1.up"]
    heard = latency.calls(model, names, 1, 300)
    examples = latency.calls(model, names, *EXAMPLE)
    for name in names:
        part = as_exported(model.get_submodule(name))
        onnx_ir.save(part_graph(part, examples[name][0], heard[name][0]), tmp_path / "part.onnx")
        session = open_session(tmp_path / "part.onnx", 1)
        inputs = {x.name: heard[name][0][int(x.name[1:])].numpy() for x in session.get_inputs()}
        with torch.no_grad():
            expected = part(*heard[name][0])
        expected = expected[0] if isinstance(expected, tuple) else expected
        result = session.run(None, inputs)[0]
        assert result.shape == tuple(expected.shape), name
        assert abs(result - expected.numpy()).mean() < 1e-2 * expected.std(), name
    assert latency.milliseconds(part, examples[name][0], heard[name][0]) > 0


@pytest.mark.parametrize("slower", [1.0, 0.8, 1.3])
@pytest.mark.parametrize("share", [0.45, 0.6, 0.9])
def test_the_mix_meets_the_latency_and_uses_what_it_may(timed, share, slower):
    """Also where the whole takes less or more than its parts were measured to."""
    rows = {row["name"]: row for row in timed["layers"]}
    tries = []

    def latency_of(steps):
        tries.append(steps)
        ms = timed["ms"]
        for text, names in chosen(steps).items():
            ms -= sum(rows[n]["ms"] - rows[n]["settings"][text]["ms"] for n in names)
        return slower * ms

    target = slower * share * timed["ms"]
    steps, ms = mixing.fit_latency(timed, target, latency_of)
    assert ms == latency_of(steps) <= target
    assert ms > 0.85 * target
    assert len(tries) <= mixing.TRIES + 1


def chosen(steps):
    """The names of rows of each setting, from steps that a mix is made of."""
    narrow = [s.config.include.split(",") for s in steps if s.method == "pruning"]
    narrow = set(narrow[0]) if narrow else set()
    found: dict[str, set[str]] = {text: set() for text in TRIED}
    found[TRIED[2]] = narrow
    for step in steps:
        if step.method == "quantization":
            text = settings.INT8 if step.config.precision == "int8" else settings.TERNARY
            for name in step.config.include.split(","):
                parts = name.split(".")
                row = ".".join(parts[:3]) if parts[0] == "blocks" else parts[0]
                if row not in narrow:
                    found[text].add(row)
    return found


def test_out_of_reach_says_how_fast_it_gets(timed):
    fastest = mixing.least(timed, "ms")
    message = rf"10 ms is out of reach of .*ternary.* takes {fastest:.1f} ms on this machine"
    with pytest.raises(ValueError, match=message):
        mixing.fit_latency(timed, 10.0, lambda steps: fastest)
    noisy = iter(np.linspace(200, 100, 99).tolist())  # never fast enough: ends all the same
    with pytest.raises(ValueError, match="out of reach"):
        mixing.fit_latency(timed, 0.9 * timed["ms"], lambda steps: next(noisy) + timed["ms"])


def test_the_command_reports_what_was_asked_and_measured(
    checkpoint, found, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(latency, "milliseconds", kilobytes)
    monkeypatch.setattr(latency, "latency", whole)
    monkeypatch.setattr(mixing, "latency", whole)
    monkeypatch.setattr(mixing, "busy_cores", lambda: 64.0)
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    (tmp_path / "scan.json").write_text(json.dumps(found))
    before = whole(checkpoint)
    target = round(0.6 * before, 1)
    model = ["--model_path", str(tmp_path / "model.pt"), "--output_dir", str(tmp_path / "out")]
    mix = [*model, "--sensitivity", str(tmp_path / "scan.json")]
    assert cli.main([*mix, "--target_latency_ms", str(target)]) == 0
    printed = capsys.readouterr().out
    said = re.search(r"latency (\S+) ms before, (\S+) ms after, (\S+) asked", printed)
    assert "the machine was busy before (load 64.0" in printed
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    result = load_checkpoint(tmp_path / "out" / "model.pt")
    assert report["mix"]["target_latency_ms"] == target == float(said[3])
    assert report["mix"]["latency_ms_before"] == pytest.approx(before)
    assert report["mix"]["latency_ms"] == pytest.approx(whole(result))
    assert whole(result) <= target
    assert float(said[2]) == pytest.approx(whole(result), abs=0.06)
    assert "--target_latency_ms" in report["command"]


def test_one_target_at_a_time(checkpoint, tmp_path, capsys):
    """A latency is that of a mix, or of a recipe's report: never of one method, never of two."""
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    model = ["--model_path", str(tmp_path / "model.pt"), "--output_dir", str(tmp_path / "out")]
    for arguments, message in (
        (["--target_latency_ms", "50", "--target_size_mb", "1"], "give one of --target_size_mb"),
        (["--target_latency_ms", "50", "--max_wer_increase", "0"], "give one of --target_size_mb"),
        (["--target_latency_ms", "-5"], "must be above 0"),
        (["--target_latency_ms", "50", "--method", "quantization"], "give either --method"),
        (["--target_latency_ms", "50", "--target_accuracy", "0.9"], "checked in the report of"),
        (["--target_latency_ms", "50", "--precision", "int8"], "--precision goes with --method"),
    ):
        assert cli.main([*model, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
