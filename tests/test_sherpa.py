"""An exported model in sherpa-onnx, a C++ runtime for NeMo's models."""

import json
import os
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from asr.corpus.manifest import Utterance, write_manifest
from asr.measure.evaluation import read_test_data, spread
from asr.runtime.pieces import WINDOW
from asr.runtime.recognizer import load
from tests.conftest import babble

pytest.importorskip("sherpa_onnx", reason="pip install sherpa-onnx sherpa-onnx-core")
check = import_module("experiments.check_sherpa_onnx")
ROOT = Path(__file__).resolve().parents[1]
CORPORA = Path(os.environ.get("ASR_CORPORA", ROOT / ".." / "shared"))
MODEL = ROOT / "experiments" / "librispeech" / "model_int8.onnx"
SPEECH = CORPORA / "LibriSpeech" / "dev-clean"  # test sets are for reports only


def test_sherpa_reads_what_we_read(tiny_onnx):
    """With half a hop of zeros in front its frames are ours; random weights then babble alike."""
    ours, sherpa = load(tiny_onnx, threads=1, min_confidence=0), check.Sherpa(tiny_onnx)
    rows = []
    for seed in range(5):
        waveform = babble(3.0, seed)
        aligned = sherpa.transcribe(np.pad(waveform, (80, 0)))
        rows.append({"ours": ours.transcribe(waveform).text, "aligned": aligned})
    assert all(row["ours"] for row in rows)
    assert check.difference(rows, "aligned") <= 0.05


def test_missing_files_are_named_before_sherpa_ends_the_process(tiny_onnx, tmp_path):
    with pytest.raises(ValueError, match=r"absent.onnx: no such file"):
        check.Sherpa(tmp_path / "absent.onnx")
    (tmp_path / "model.onnx").write_bytes(tiny_onnx.read_bytes())
    with pytest.raises(ValueError, match=r"tokens.txt: no such file"):
        check.Sherpa(tmp_path / "model.onnx")


def test_a_place_that_cannot_be_written_is_told_at_once(clip, tmp_path, monkeypatch, capsys):
    write_manifest(tmp_path / "test.json", [Utterance(str(clip), 2.0, "hello")])
    monkeypatch.setattr(check, "compare", None)
    flags = ["--model_path", "model.onnx", "--test_data", str(tmp_path / "test.json")]
    assert check.main([*flags, "--output_path", str(tmp_path)]) == 2
    assert "a folder; name a file in it" in capsys.readouterr().err


@pytest.fixture(scope="module")
def real_speech(tmp_path_factory):
    """The comparison on sixty utterances of dev-clean, short enough to be read in one window."""
    if not MODEL.exists() or not SPEECH.is_dir():
        pytest.skip("no trained model, or no real speech: ASR_CORPORA")
    folder = tmp_path_factory.mktemp("sherpa")
    manifest, output = folder / "dev.json", folder / "result.json"
    whole = [u for u in read_test_data(SPEECH) if u.duration < WINDOW - 1]  # sherpa has no windows
    write_manifest(manifest, spread(whole, 60))
    flags = ["--model_path", str(MODEL), "--test_data", str(manifest)]
    check.main([*flags, "--output_path", str(output)])
    return json.loads(output.read_text())


def test_equal_frames_of_real_speech_give_equal_texts(real_speech):
    assert real_speech["utterances"] == 60
    assert abs(real_speech["wer"] - real_speech["sherpa_wer"]) <= 0.03
    assert real_speech["characters_differing_aligned"] <= 0.01


@pytest.mark.xfail(strict=True, reason="the model that ships, at 37 % WER, hangs on single frames")
def test_half_a_hop_changes_few_characters_of_real_speech(real_speech):
    """AN4's model keeps this bound: experiments/an4_from_nothing/sherpa_onnx.json."""
    assert real_speech["characters_differing"] <= 0.03
