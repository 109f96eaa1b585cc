"""Fixtures that several test files use: a tiny model, its two files, and a clip to read."""

import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from asr.network.checkpoint import Checkpoint, save_checkpoint
from asr.network.export import to_onnx
from asr.network.model import ConformerCTC
from asr.runtime.config import ModelConfig
from asr.runtime.tokenizer import Tokenizer


def pytest_configure(config):
    logging.getLogger("torch.__trace").propagate = False  # every step of tracing, kept by pytest
    config.addinivalue_line("markers", "slow: takes more than a quarter of a minute")


def build_tiny_model(**changes) -> ConformerCTC:
    """Random weights and statistics, and a head that avoids the blank, so that it babbles."""
    torch.manual_seed(0)
    dimensions = dict(d_model=32, n_layers=2, n_heads=2, conv_kernel_size=7, subsampling_channels=8)
    model = ConformerCTC(ModelConfig(**dimensions | changes)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.conv.batch_norm.running_mean.normal_()
            block.conv.batch_norm.running_var.uniform_(0.5, 2)
            block.attn.bias_u.normal_()
            block.attn.bias_v.normal_()
        model.head.weight.mul_(3)
        model.head.bias[0] -= 0.5
    return model


@pytest.fixture
def tiny_model() -> ConformerCTC:
    """A new model for every test, so that a test may change it."""
    return build_tiny_model()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """The .pt of `tiny_model`."""
    path = tmp_path_factory.mktemp("tiny") / "model.pt"
    data = {"train": "/home/somebody/recordings"}
    save_checkpoint(path, Checkpoint(build_tiny_model(), Tokenizer.characters(), data=data))
    return path


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory) -> Path:
    """The .onnx of `tiny_model`, with tokens.txt beside it; torch takes seconds to trace it."""
    path = tmp_path_factory.mktemp("tiny-onnx") / "model.onnx"
    to_onnx(Checkpoint(build_tiny_model(), Tokenizer.characters()), path)
    return path


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """A WAV file: two seconds of tones and noise at 16 kHz."""
    path = tmp_path_factory.mktemp("clip") / "clip.wav"
    soundfile.write(path, babble(2.0), 16000, subtype="PCM_16")
    return path


def babble(seconds: float, seed: int = 0) -> np.ndarray:
    """A waveform whose tone changes every tenth of a second, (N,) float32."""
    random = np.random.default_rng(seed)
    n = int(seconds * 16000)
    pitch = np.repeat(random.uniform(100, 3000, n // 1600 + 1), 1600)[:n]
    tone = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / 16000)
    return (tone + 0.02 * random.standard_normal(n)).astype(np.float32)
