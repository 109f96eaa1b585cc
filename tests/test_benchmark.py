"""scripts/benchmark.py: that its numbers are what they say, on models that take no time."""

import json
import os
from importlib import import_module

import numpy as np
import pytest

from asr.measure import benchmark, training_speed
from asr.runtime.config import ModelConfig
from asr.training.train_config import TrainConfig
from tests.corpus import write_corpus

script = import_module("scripts.benchmark")


def tiny(**changes) -> ModelConfig:
    return ModelConfig(
        d_model=16, n_layers=1, n_heads=2, conv_kernel_size=7, subsampling_channels=4, **changes
    )


@pytest.fixture
def quick(monkeypatch):
    """Any preset becomes a tiny model."""
    monkeypatch.setattr(training_speed, "preset", lambda name, **changes: tiny(**changes))


def test_synthetic_speech_can_be_trained_on():
    with benchmark.synthetic_speech(3) as utterances:
        assert len(utterances) == 3
        for u in utterances:
            assert 2 <= u.duration <= 16
            assert os.path.exists(u.audio_filepath)
            assert len(u.text) == pytest.approx(14 * u.duration, rel=0.3)
    assert not os.path.exists(utterances[0].audio_filepath)


def test_noise_is_loud_enough_and_long_enough():
    waveform = benchmark.noise(10.0, np.random.default_rng(0))
    assert waveform.shape == (160_000,)
    assert waveform.dtype == np.float32
    assert 0.01 < np.abs(waveform).mean() < 1


def test_training_speed_counts_audio_over_time(quick, monkeypatch):
    """With a clock that ticks once a look, a step takes 3 ticks, of which the loader 1."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(training_speed.time, "perf_counter", lambda: float(next(ticks)))
    config = TrainConfig(batch_size=2, num_workers=0, threads=1, precision="float32", speed=0.0)
    with benchmark.synthetic_speech(4) as utterances:
        row = training_speed.train_speed(utterances, "base", config, steps=4, warmup=1)
    seconds = sum(u.duration for u in utterances)
    assert row["loader_share"] == pytest.approx(1 / 3)
    assert row["step_seconds"] == 3
    # an epoch is two batches; four steps are two epochs but for the order of the warm-up
    assert row["overall"] == pytest.approx(2 * seconds / 12, rel=0.3)
    assert row["audio_per_second"] == pytest.approx(row["audio_per_step"] / 3, rel=1e-6)


def test_train_command(quick, tmp_path, capsys):
    output = tmp_path / "made" / "speed.json"
    code = script.main([
        "train", "--preset", "tiny", "base", "--precision", "float32", "--batch_size", "1", "2",
        "--steps", "2", "--warmup", "1", "--num_workers", "1", "--threads", "1",
        "--output_path", str(output),
    ])  # fmt: skip
    assert code == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    assert [(r["preset"], r["batch_size"]) for r in result["results"]] == [
        ("tiny", 1), ("tiny", 2), ("base", 1), ("base", 2)
    ]  # fmt: skip
    for row in result["results"]:
        assert row["audio_per_second"] > 0
        assert 0 <= row["loader_share"] <= 1
        assert row["loader_alone"] > 0
        assert row["precision"] == "float32"
    assert {"command", "commit", "machine"} <= set(result)
    assert "audio s/s" in capsys.readouterr().out


def test_train_on_a_manifest(quick, tmp_path):
    folder = write_corpus(tmp_path / "corpus")
    output = tmp_path / "speed.json"
    code = script.main([
        "train", "--data_dir", str(folder), "--steps", "3", "--warmup", "1", "--batch_size", "4",
        "--num_workers", "0", "--threads", "1", "--output_path", str(output),
    ])  # fmt: skip
    assert code == 0
    row = json.loads(output.read_text(encoding="utf-8"))["results"][0]
    assert 0.2 < row["audio_per_step"] < 4  # four utterances of 0.2 to 1 s


def test_infer_command(tiny_checkpoint, tmp_path, capsys):
    output = tmp_path / "infer.json"
    code = script.main([
        "infer", "--model_path", str(tiny_checkpoint), str(tiny_checkpoint), "--threads", "1",
        "--rounds", "3", "--output_path", str(output),
    ])  # fmt: skip
    assert code == 0
    first, second = json.loads(output.read_text(encoding="utf-8"))["results"]
    assert first["speedup"] == 1
    assert second["speedup"] == pytest.approx(first["latency"] / second["latency"])
    for row in (first, second):
        assert 0 < row["fastest"] <= row["latency"]
        assert row["rtf"] == pytest.approx(row["latency"] / 10)
        assert row["bytes"] == tiny_checkpoint.stat().st_size
        assert row["model"].startswith("...")
    assert "speed-up" in capsys.readouterr().out


def test_rounds_are_interleaved(monkeypatch, tmp_path):
    """Slow drifts of the machine fall on all models alike."""
    calls = []

    class Fake:
        def __init__(self, path, threads, audio):
            self.case = (path, threads)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            calls.append("closed")

        def round(self):
            calls.append(self.case)
            return [{"a": 2.0, "b": 1.0}[self.case[0].name] / self.case[1]]

        def peak_rss(self):
            return 1

    monkeypatch.setattr(benchmark, "TimedModel", Fake)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.touch()
    with benchmark.synthetic_speech(1) as utterances:
        audio = utterances[0].audio_filepath
        rows = benchmark.infer_speed(paths, audio, [1, 2], rounds=3, warmup=1)
    cases = [(path, n) for n in (1, 2) for path in paths]
    assert calls == cases * 4 + ["closed"] * 4
    assert [row["speedup"] for row in rows] == [1, 2, 1, 2]
    assert [row["latency"] for row in rows] == [2, 1, 1, 0.5]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["infer", "--model_path", "absent.onnx", "--threads", "1"], "no such model"),
        (["infer", "--model_path", "absent.onnx", "--audio_path", "absent.wav"], "absent.wav"),
        (["train", "--data_dir", "absent"], "no such file or folder"),
        (["train", "--device", "abacus"], "not a device"),
    ],
)
def test_mistakes_are_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script.main([*argv, "--output_path", "made/r.json"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert os.listdir("made") == []


@pytest.mark.parametrize("argv", [["train", "--steps", "0"], ["infer"], ["train", "--preset", "x"]])
def test_flags_out_of_range(argv, capsys):
    assert script.main(argv) == 2


def test_compressing_is_measured_method_by_method(tmp_path, monkeypatch, capsys):
    compressing = import_module("experiments.measure_compressing")
    monkeypatch.setattr(compressing, "preset", lambda name, **changes: tiny(**changes))
    out = tmp_path / "result.json"
    flags = ["--methods", "int8", "structured_30_taylor", "--output_path", str(out)]
    assert compressing.main(flags) == 0, capsys.readouterr().err
    rows = json.loads(out.read_text())["results"]
    assert [row["method"] for row in rows] == ["int8", "structured_30_taylor"]
    assert all(0.2 < row["seconds"] < 60 and 5e7 < row["peak_rss"] < 3e9 for row in rows)
    assert rows[0]["bytes"] < rows[1]["bytes"]
