"""Distillation with exported teachers, interrupted caches and several processes."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from asr.common.provenance import ROOT
from asr.network.checkpoint import load_checkpoint, save_checkpoint
from asr.network.export import export_onnx
from compress.distillation.teacher import answers, load_teachers
from tests.corpus import write_corpus
from tests.test_distillation import build, distilled, same, stop_at_step


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("merging", [False, True])
def test_an_exported_teacher_says_what_its_checkpoint_says(merging, corpus, tmp_path):
    more = dict(subsampling_factor=2, reduction_position=2, reduction_factor=2) if merging else {}
    checkpoint = build(corpus, **more)
    save_checkpoint(tmp_path / "teacher.pt", checkpoint)
    export_onnx(tmp_path / "teacher.pt", tmp_path / "teacher.onnx")
    torch.manual_seed(0)
    features, lengths = torch.randn(2, 80, 80), torch.tensor([80, 60])
    said = [
        answers(load_teachers(str(tmp_path / name), checkpoint), features, lengths, 20, "float32")
        for name in ("teacher.pt", "teacher.onnx")
    ]
    for a, b, n in zip(*said, (20, 15), strict=True):
        np.testing.assert_allclose(a[:n], b[:n], atol=1e-4)
    result = distilled(checkpoint, teacher=str(tmp_path / "teacher.onnx"), alpha=0.0)
    other = distilled(checkpoint, teacher=str(tmp_path / "teacher.pt"), alpha=0.0)
    for a, b in zip(result.model.parameters(), other.model.parameters(), strict=True):
        assert float((a - b).abs().max()) < 2e-3


def test_hints_need_a_checkpoint(corpus, tmp_path):
    checkpoint = build(corpus)
    save_checkpoint(tmp_path / "teacher.pt", checkpoint)
    export_onnx(tmp_path / "teacher.pt", tmp_path / "teacher.onnx")
    with pytest.raises(ValueError, match=r"needs one teacher, a \.pt"):
        distilled(checkpoint, teacher=str(tmp_path / "teacher.onnx"), hint_weight=1.0)


def test_a_stopped_run_with_a_cache_goes_on_to_the_bit(corpus, tmp_path, monkeypatch):
    checkpoint = build(corpus)
    options = {"epochs": 2, "cache": str(tmp_path / "cache")}
    whole = distilled(checkpoint, tmp_path / "whole", **options)
    written = (tmp_path / "cache" / "values.npy").stat().st_mtime_ns
    stop_at_step(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        distilled(checkpoint, tmp_path / "parts", **options)
    monkeypatch.undo()
    again = distilled(checkpoint, tmp_path / "parts", **options)
    assert same(again.model, whole.model)
    assert (tmp_path / "cache" / "values.npy").stat().st_mtime_ns == written


def test_two_processes_distil_like_one(corpus, tmp_path):
    """torchrun with two processes against one that joins two batches in a step, with a cache.

    Tolerance 2e-3: sums run in another order, and an odd last batch is repeated for two.
    """
    checkpoint = build(corpus)
    for name, accumulate in (("one", 2), ("two", 1)):
        checkpoint.history[0]["config"] = checkpoint.history[0]["config"] | {
            "accumulate": accumulate, "batch_size": 3,
        }  # fmt: skip
        save_checkpoint(tmp_path / f"{name}.pt", checkpoint)

    def run(name: str, *launcher: str) -> list[float]:
        command = [
            sys.executable, *launcher, "compress.py", "--method", "distillation",
            "--model_path", str(tmp_path / f"{name}.pt"), "--n_layers", "2",
            "--cache", str(tmp_path / f"cache_{name}"), "--fine_tune_epochs", "2",
            "--output_dir", str(tmp_path / name),
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("epoch 2/2") == 1  # one process speaks
        student = load_checkpoint(tmp_path / name / "model.pt")
        assert student.history[-1]["step"] == "distillation"
        return [float(p.norm()) for p in student.model.parameters()]

    alone = run("one")
    both = run("two", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert both == pytest.approx(alone, rel=2e-3, abs=2e-3)
