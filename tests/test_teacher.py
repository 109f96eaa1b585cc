"""Learning from another network: what it is asked, and that the student comes nearer to it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from asr.network.model import Output
from asr.runtime.config import FeatureConfig
from asr.training.data import Batch
from asr.training.learner import Learner
from asr.training.teacher import Taught, Teacher
from asr.training.train import main as train
from asr.training.train_config import TrainConfig
from tests.conftest import build_tiny_model
from tests.corpus import write_corpus


def loudness(waveform):
    """Three numbers a frame of 20 ms: how loud it is, and two that are always the same."""
    frames = waveform[: len(waveform) // 320 * 320].reshape(-1, 320)
    power = np.log(np.square(frames).mean(axis=1) + 1e-6)
    return np.stack([power, np.ones_like(power), np.zeros_like(power)], axis=1)


def flat(waveform):
    return np.zeros(7, np.float32)


NAME = "tests.test_teacher:loudness"


def test_a_function_teaches():
    teacher = Teacher(NAME, "", FeatureConfig())
    assert teacher.width == 3
    assert teacher(np.zeros(16000, np.float32)).shape == (50, 3)


def test_a_model_of_ours_teaches(tiny_onnx):
    teacher = Teacher(str(tiny_onnx), "logprobs", FeatureConfig())
    assert teacher(np.zeros(16000, np.float32)).shape == (26, teacher.width)


@pytest.mark.parametrize(
    ("name", "output", "message"),
    [
        ("none.onnx", "", "no such teacher"),
        ("tests.test_teacher:none", "", "neither .onnx nor MODULE:FUNCTION"),
        ("tests.test_teacher:flat", "", "one vector a frame"),
    ],
)
def test_what_cannot_teach_is_named(name, output, message):
    with pytest.raises(ValueError, match=message):
        Teacher(name, output, FeatureConfig())


def test_an_output_that_is_not_there_is_named(tiny_onnx):
    with pytest.raises(ValueError, match="no output 'hidden'; there are logprobs"):
        Teacher(str(tiny_onnx), "hidden", FeatureConfig())


def test_the_distance_is_that_of_stretched_hints():
    """By hand: hints at another rate, of two utterances of other lengths."""
    learner = Learner(build_tiny_model(), TrainConfig(threads=1, precision="float32"))
    learner.objective = lambda *_: torch.zeros(())
    taught = Taught(learner, 3, 1, weight=2.0)
    features, lengths = torch.randn(2, 64, 80), torch.tensor([64, 40])
    hints = [torch.randn(32, 3), torch.randn(20, 3)]
    output: Output = learner.model(features, lengths)
    batch = Batch(features, lengths, torch.zeros(2, 1), torch.ones(2), (0, 1), 1.0, hints)
    got = taught(output, batch, features, lengths)
    expected = 0.0
    for i, n in enumerate((16, 10)):
        own = (taught.hidden[i, :n] @ taught.head.weight.T + taught.head.bias).detach().numpy()
        at = np.clip((np.arange(n) + 0.5) * len(hints[i]) / n - 0.5, 0, None)  # centres of frames
        columns = hints[i].numpy().T
        wanted = np.stack([np.interp(at, np.arange(len(hints[i])), c) for c in columns], axis=1)
        expected += 2.0 * np.square(own - wanted).mean(axis=1).sum()
    assert float(got) == pytest.approx(expected, rel=1e-4)


def test_training_goes_on_with_its_teacher(tiny_checkpoint, tmp_path):
    data = write_corpus(tmp_path / "data", 1)
    flags = [
        "--init_from", tiny_checkpoint, "--data_dir", data, "--output_dir", tmp_path / "run",
        "--teacher", NAME, "--teacher_block", 1, "--warmup_steps", 1, "--num_workers", 0,
        "--log_every", 1, "--no-tensorboard", "--learning_rate", 0.003, "--noise", 1.0,
    ]  # fmt: skip
    assert train([str(flag) for flag in (*flags, "--epochs", 2)]) == 0
    assert train([str(flag) for flag in (*flags, "--epochs", 4, "--resume")]) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]
