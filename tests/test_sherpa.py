"""An exported model in sherpa-onnx, a C++ runtime for NeMo's models."""

import json
import os
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from asr.evaluation import read_test_data
from asr.recognizer import load
from tests.conftest import babble

pytest.importorskip("sherpa_onnx", reason="pip install sherpa-onnx sherpa-onnx-core")
check = import_module("scripts.check_sherpa_onnx")
ROOT = Path(__file__).resolve().parents[1]
CORPORA = Path(os.environ.get("ASR_CORPORA", ROOT / ".." / "shared"))
MODEL = ROOT / "experiments" / "librispeech" / "model_int8.onnx"
SPEECH = CORPORA / "LibriSpeech" / "test-clean"


def test_sherpa_reads_what_we_read(tiny_onnx):
    """With half a hop of zeros in front its frames are ours; random weights then babble alike."""
    ours, sherpa = load(tiny_onnx, threads=1), check.Sherpa(tiny_onnx)
    rows = []
    for seed in range(5):
        waveform = babble(3.0, seed)
        aligned = sherpa.transcribe(np.pad(waveform, (80, 0)))
        rows.append({"ours": ours.transcribe(waveform), "aligned": aligned})
    assert all(row["ours"] for row in rows)
    assert check.difference(rows, "aligned") <= 0.05


def test_missing_files_are_named_before_sherpa_ends_the_process(tiny_onnx, tmp_path):
    with pytest.raises(ValueError, match=r"absent.onnx: no such file"):
        check.Sherpa(tmp_path / "absent.onnx")
    (tmp_path / "model.onnx").write_bytes(tiny_onnx.read_bytes())
    with pytest.raises(ValueError, match=r"tokens.txt: no such file"):
        check.Sherpa(tmp_path / "model.onnx")


@pytest.mark.skipif(not MODEL.exists(), reason=f"no trained model at {MODEL.relative_to(ROOT)}")
@pytest.mark.skipif(not SPEECH.is_dir(), reason="no real speech: ASR_CORPORA")
def test_texts_of_real_speech_agree(tmp_path):
    assert len(read_test_data(SPEECH)) >= 10
    flags = ["--model_path", str(MODEL), "--test_data", str(SPEECH), "--limit", "10"]
    check.main([*flags, "--output_file", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert abs(result["wer"] - result["sherpa_wer"]) <= 0.03  # ten utterances, not fifty
    assert result["characters_differing_aligned"] <= 0.01
    rate = json.loads((MODEL.parent / "int8_onnx_test-clean.json").read_text())["wer"]
    if rate <= 0.5:  # a model that hears less hangs on every frame: half a hop changes more
        assert result["characters_differing"] <= 0.03
