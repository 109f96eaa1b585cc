"""Imports against NeMo, where NEMO_PYTHON is a Python with nemo_toolkit (nemo_itself.py)."""

import os
from pathlib import Path

import pytest

from experiments.importing import check_nemo

PYTHON = os.environ.get("NEMO_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="NEMO_PYTHON names no Python with NeMo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """NeMo's archives and numbers; building them takes NeMo half a minute."""
    path = tmp_path_factory.mktemp("nemo")
    check_nemo.build(PYTHON, path)
    return path


@pytest.mark.parametrize("name", check_nemo.NAMES)
def test_nemos_own_models_are_met(folder, name):
    row = check_nemo.compare(folder, name)
    assert row["log_probs"] < check_nemo.TOLERANCE, row
    assert row["same_tokens"]
    assert row["spread"] > 0.1  # numbers that could be told apart


def test_other_runtimes_read_the_same_from_our_export_as_from_nemos(folder):
    pytest.importorskip("sherpa_onnx")
    pytest.importorskip("onnx_asr")
    from experiments.importing.runtimes import compare_exports

    for row in compare_exports(folder, check_nemo.EXPORTED):
        assert row["same_tokens"], row
        assert row["tokens"] > 3
