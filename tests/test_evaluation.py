"""evaluate.py in process: what it counts, measures, writes, compares and refuses."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from asr.common import provenance
from asr.common.metrics import error_rates
from asr.corpus.manifest import Utterance, read_manifest, write_manifest
from asr.measure import machine, timing
from asr.measure.evaluate import main
from asr.measure.evaluation import evaluate, read_test_data, spread, transcribe_all
from asr.measure.scores import compare
from asr.measure.timing import TimedModel, measure, peak_memory, summarise
from asr.network.checkpoint import Checkpoint, save_checkpoint
from asr.runtime.pieces import WINDOW
from asr.runtime.recognizer import load
from asr.runtime.tokenizer import Tokenizer
from tests.conftest import build_tiny_model
from tests.corpus import tone_waveform, write_corpus

ROOT = Path(__file__).resolve().parents[1]

CORPORA = Path(os.environ.get("ASR_CORPORA", Path(__file__).parents[1] / ".." / "shared"))


@pytest.fixture(scope="module")
def models(tiny_checkpoint, tiny_onnx) -> dict[str, Path]:
    return {"pt": tiny_checkpoint, "onnx": tiny_onnx}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The manifest of 18 short utterances."""
    return write_corpus(tmp_path_factory.mktemp("corpus")) / "train.json"


def run(models, data, *more, kind="pt") -> int:
    flags = ["--model_path", str(models[kind]), "--test_data", str(data), "--threads", "1"]
    return main([*flags, *map(str, more)])


def record(folder: Path, waveform: np.ndarray, name: str = "a") -> Utterance:
    path = folder / f"{name}.wav"
    soundfile.write(path, waveform, 16000)
    return Utterance(str(path), len(waveform) / 16000, "hello there")


# ---- accuracy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pt", "onnx"])
def test_the_texts_are_those_of_transcribe_in_any_batch(models, data, kind):
    recognizer = load(models[kind], threads=1, min_confidence=0)
    utterances = read_manifest(data)
    expected = [recognizer.transcribe(u.audio_filepath).text for u in utterances]
    assert len(set(expected)) > 5
    for batch_size in (1, 4, 100):
        assert transcribe_all(recognizer, utterances, batch_size) == expected


def test_both_files_give_the_same_texts(models, data):
    utterances = read_manifest(data)
    pt, onnx = (transcribe_all(load(models[k], 1), utterances, 4) for k in ("pt", "onnx"))
    assert pt == onnx


def test_long_and_silent_recordings_are_treated_as_in_transcribe(models, tmp_path):
    rng = np.random.default_rng(0)
    utterances = [
        record(tmp_path, 0.1 * rng.standard_normal(int((WINDOW + 3) * 16000)), "long"),
        record(tmp_path, np.zeros(8000), "silent"),
        record(tmp_path, tone_waveform("abc"), "tones"),
    ]
    recognizer = load(models["pt"], threads=1, min_confidence=0)
    expected = [recognizer.transcribe(u.audio_filepath).text for u in utterances]
    assert expected[1] == ""
    assert transcribe_all(recognizer, utterances, 3) == expected


def test_dynamic_integer_models_run_one_utterance_at_a_time(models, data, monkeypatch):
    recognizer = load(models["pt"], threads=1, min_confidence=0)
    utterances = read_manifest(data)
    expected = transcribe_all(recognizer, utterances, 8)
    sizes = []
    run_backend = recognizer._backend.run

    def counted(features, lengths):
        sizes.append(len(lengths))
        return run_backend(features, lengths)

    monkeypatch.setattr(recognizer._backend, "run", counted)
    monkeypatch.setattr(recognizer, "one_at_a_time", True)
    assert transcribe_all(recognizer, utterances, 8) == expected
    assert set(sizes) == {1}


def test_the_result_has_rates_counts_and_texts(models, data):
    utterances = read_manifest(data)
    result = evaluate(models["pt"], utterances, threads=1, measure_latency=False)
    rows = result["utterances"]
    assert [row["id"] for row in rows] == [u.id for u in utterances]
    expected = error_rates([u.text for u in utterances], [row["hypothesis"] for row in rows])
    for key, value in expected.items():
        assert result[key] == value
    assert result["wer"] == sum(r["word_errors"] for r in rows) / sum(r["words"] for r in rows)
    assert result["cer"] == (
        sum(r["character_errors"] for r in rows) / sum(r["characters"] for r in rows)
    )
    low, high = result["wer_interval"]
    assert low <= result["wer"] <= high
    assert result["bytes"] == models["pt"].stat().st_size
    assert result["params"] == sum(
        p.numel() for p in load(models["pt"])._backend._model.parameters()
    )
    worst = [row["word_errors"] for row in result["worst"]]
    assert worst == sorted((r["word_errors"] for r in rows), reverse=True)[: len(worst)]
    assert "latency_p50" not in result


# ---- speed and memory ---------------------------------------------------------------------------


def test_capitals_do_not_count_and_are_told(data, tmp_path, capsys):
    """References are read in lower case; an imported model may write `Hello`."""
    letters = "abcdefghijklmnopqrstuvwxyz'"
    results = []
    for name, alphabet in (("low", letters), ("mixed", letters[:13].upper() + letters[13:])):
        checkpoint = Checkpoint(build_tiny_model(), Tokenizer(["<blk>", "▁", *alphabet]))
        save_checkpoint(tmp_path / f"{name}.pt", checkpoint)
        flags = ["--model_path", str(tmp_path / f"{name}.pt"), "--test_data", str(data)]
        flags += ["--output_path", str(tmp_path / "r.json"), "--threads", "1", "--no_speed"]
        assert main(flags) == 0
        results.append(json.loads((tmp_path / "r.json").read_text()))
        assert ("capitals are not compared" in capsys.readouterr().out) == (name == "mixed")
    low, mixed = results
    assert (low["formatted"], mixed["formatted"]) == (False, True)
    assert (low["cer"], low["confusions"]) == (mixed["cer"], mixed["confusions"])
    assert mixed["unwritable"] == {}


def test_speed_is_measured_in_a_process_of_its_own(models, data):
    utterances = read_manifest(data)[:3]
    audio, durations = zip(*((u.audio_filepath, u.duration) for u in utterances), strict=True)
    result = measure(models["onnx"], 1, audio, durations, rounds=2)
    assert 0 < result["latency_p50"] <= result["latency_p95"] < 30
    assert result["rtf"] > 0
    # inference of an .onnx alone, not what this process with torch in it holds
    assert 20e6 < result["peak_rss"] < 200e6 < peak_memory()


def test_memory_is_unknown_where_the_system_does_not_say(monkeypatch):
    """As on Windows: neither /proc nor the module resource."""
    monkeypatch.setattr(timing, "Path", lambda _: Path("absent"))
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(timing.peak_memory())


def test_definitions():
    result = summarise([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    assert result == pytest.approx({"rtf": 0.1, "latency_p50": 0.2, "latency_p95": 0.29})


def test_the_process_has_the_threads_asked_for(models, data, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    audio = [read_manifest(data)[0].audio_filepath]
    with TimedModel(models["pt"], 1, audio) as model:
        model.round()
        environment = Path(f"/proc/{model._process.pid}/environ")
        if environment.exists():
            assert b"OMP_NUM_THREADS=1\0" in environment.read_bytes()
    assert model._process.returncode == 0


def test_a_failure_in_the_process_is_its_own_line(models, tmp_path):
    with pytest.raises(ValueError, match=r"absent\.wav: no such audio file"):
        TimedModel(models["onnx"], 1, [tmp_path / "absent.wav"])
    with pytest.raises(ValueError, match="no such model"):
        TimedModel(tmp_path / "absent.onnx", 1, [])


def test_the_speed_sample_spans_all_durations():
    utterances = [Utterance(f"{i}.wav", float(i), "x") for i in (5, 3, 9, 1, 7, 2, 8)]
    assert [u.duration for u in spread(utterances, 3)] == [1, 5, 9]
    assert len(spread(utterances, 100)) == 7


# ---- the command --------------------------------------------------------------------------------


def test_the_whole_command(models, data, tmp_path, capsys):
    output = tmp_path / "made" / "r.json"
    assert run(models, data, "--output_file", output, "--limit", 3) == 0
    out = capsys.readouterr().out
    for text in ("3 utterances", "WER", "CER", "95 % interval", "substitutions", "RTF",
                 "without reading the audio file", "peak memory", "worst utterances", "said",
                 "heard"):  # fmt: skip
        assert text in out
    result = json.loads(output.read_text(encoding="utf-8"))
    assert set(result) >= {
        "wer", "cer", "rtf", "latency_p50", "latency_p95", "bytes", "params", "peak_rss",
        "command", "commit", "seed", "machine", "speed", "utterances",
    }  # fmt: skip
    assert len(result["utterances"]) == 3
    assert result["speed"][0]["threads"] == 1
    assert result["command"].startswith("python evaluate.py --model_path .../")
    assert result["machine"]["cores"] >= 1
    assert os.listdir(output.parent) == ["r.json"]


def test_a_result_names_no_place(models, data, tmp_path):
    output = tmp_path / "r.json"
    assert run(models, data, "--output_file", output, "--no_speed") == 0
    text = output.read_text(encoding="utf-8")
    places = (tmp_path.parent, Path.home(), provenance.ROOT, os.uname().nodename)
    for place in map(str, places):
        assert place == "/" or place not in text


def test_several_sets_count_as_one_and_each_apart(models, data, tmp_path, capsys):
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    parts = [data.with_name(f"{name}.json") for name in ("first", "second")]
    for path, some in zip(parts, (lines[:5], lines[5:]), strict=True):
        path.write_text("".join(some), encoding="utf-8")
    output, whole = tmp_path / "r.json", tmp_path / "whole.json"
    flags = ["--no_speed", "--model_path", str(models["pt"]), "--threads", "1"]
    assert main([*flags, "--test_data", *map(str, parts), "--output_file", str(output)]) == 0
    out = capsys.readouterr().out
    assert run(models, data, "--no_speed", "--output_file", whole, "--compare", output) == 0
    result, expected = (json.loads(p.read_text(encoding="utf-8")) for p in (output, whole))
    assert (result["wer"], result["words"]) == (expected["wer"], expected["words"])
    for part, path, some in zip(result["sets"], parts, (lines[:5], lines[5:]), strict=True):
        assert run(models, path, "--no_speed", "--output_file", whole) == 0
        alone = json.loads(whole.read_text(encoding="utf-8"))
        assert part["utterances"] == len(some)
        for key in ("wer", "cer", "words", "wer_interval"):
            assert part[key] == alone[key]
        assert f"{part['test_data']}: {len(some)} utterances" in out
    assert "sets" not in expected


def test_texts_can_stay_out_of_the_file(models, data, tmp_path, capsys):
    output = tmp_path / "r.json"
    assert run(models, data, "--output_file", output, "--no_speed", "--no_texts") == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    assert not {"confusions", "worst"} & set(result)
    assert all("hypothesis" not in row and "reference" not in row for row in result["utterances"])
    capsys.readouterr()
    assert run(models, data, "--no_speed", "--compare", output) == 0
    out = capsys.readouterr().out
    assert "delta WER +0.00 points" in out
    assert "identical texts 100.0%" in out  # by their digests


def test_comparison_of_two_files(models, data, tmp_path, capsys):
    first, second = tmp_path / "pt.json", tmp_path / "onnx.json"
    assert run(models, data, "--output_file", first, "--no_speed", "--no_texts") == 0
    code = run(models, data, "--output_file", second, "--no_speed", "--compare", first, kind="onnx")
    assert code == 0
    assert "identical texts 100.0%" in capsys.readouterr().out
    comparison = json.loads(second.read_text(encoding="utf-8"))["comparison"]
    assert comparison["identical"] == 1
    assert comparison["wer"]["delta"] == 0
    assert comparison["other"].endswith("pt.json")


def test_comparison_needs_the_same_utterances(models, data, tmp_path, capsys):
    output = tmp_path / "r.json"
    assert run(models, data, "--output_file", output, "--no_speed", "--limit", 2) == 0
    assert run(models, data, "--no_speed", "--limit", 3, "--compare", output) == 2
    assert "not of the same utterances" in capsys.readouterr().err


def test_comparison_by_counts():
    def result(*errors):
        return {"utterances": [
            {"id": str(i // 2), "duration": i, "words": 10, "word_errors": e, "characters": 50,
             "character_errors": e}
            for i, e in enumerate(errors)  # two of each name, as in folders of their own
        ]}  # fmt: skip

    out = compare(result(2, 2, 2, 2), result(1, 1, 1, 1))
    assert out["wer"]["delta"] == pytest.approx(0.1)
    assert out["wer"]["interval"] == pytest.approx([0.1, 0.1])
    assert out["cer"]["delta"] == pytest.approx(0.02)
    shuffled = {"utterances": result(1, 2, 3, 4)["utterances"][::-1]}
    assert compare(result(1, 2, 3, 4), shuffled)["wer"]["interval"] == [0, 0]


def test_of_several_splits_those_named_test_are_taken(data, tmp_path):
    utterances = read_manifest(data)
    for name, count in (("train", 5), ("dev", 4), ("test-clean", 2), ("test-other", 1)):
        write_manifest(tmp_path / f"{name}.json", utterances[:count])
    assert len(read_test_data(tmp_path)) == 3
    assert len(read_test_data(tmp_path / "dev.json")) == 4
    for name in ("test-clean", "test-other"):
        (tmp_path / f"{name}.json").unlink()
    with pytest.raises(ValueError, match=r"dev, train.*none named test\*"):
        read_test_data(tmp_path)


# ---- mistakes: one line, exit code 2, nothing written ------------------------------------------


def refused(models, tmp_path, capsys, **changes) -> str:
    """Runs a command that must fail; returns its one line."""
    output = tmp_path / "out" / "r.json"
    flags = {"model_path": models["pt"], "output_file": output, **changes}
    argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    assert main([*argv, "--no_speed"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    if output.parent.exists():
        assert os.listdir(output.parent) == []
    return err


def test_models_that_are_none(models, data, tmp_path, capsys):
    broken = tmp_path / "broken.pt"
    broken.write_bytes(models["pt"].read_bytes()[:5000])
    half = tmp_path / "half.onnx"
    half.write_bytes(models["onnx"].read_bytes()[:5000])
    other = tmp_path / "model.bin"
    other.touch()
    for path, message in [
        (tmp_path / "absent.pt", "no such model"), (tmp_path, "a folder"), (broken, "unreadable"),
        (half, "not a usable ONNX file"), (other, ".onnx or .pt"),
    ]:  # fmt: skip
        line = refused(models, tmp_path, capsys, model_path=path, test_data=data)
        assert str(path) in line
        assert message in line


def test_data_that_is_none(models, data, tmp_path, capsys):
    broken = tmp_path / "broken.json"
    broken.write_text(data.read_text(encoding="utf-8") + '{"text": \n', encoding="utf-8")
    assert "broken.json, line 19" in refused(models, tmp_path, capsys, test_data=broken)
    absent = tmp_path / "absent"
    assert "no such file or folder" in refused(models, tmp_path, capsys, test_data=absent)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.wav", None, "no such audio file"), ("empty.wav", b"", "the file is empty"),
        ("text.wav", b"not audio at all" * 50, "not audio"),
    ],
)  # fmt: skip
def test_audio_that_is_none(models, tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path / "test.json", [Utterance(str(tmp_path / name), 1.0, "hello")])
    line = refused(models, tmp_path, capsys, test_data=tmp_path / "test.json")
    assert name in line
    assert message in line


def test_audio_shorter_than_a_frame_is_named(models, tmp_path, capsys):
    write_manifest(tmp_path / "test.json", [record(tmp_path, np.full(300, 0.5), "blip")])
    line = refused(models, tmp_path, capsys, test_data=tmp_path / "test.json")
    assert "blip.wav" in line
    assert "shorter than one output frame" in line


def test_texts_without_words(models, tmp_path, capsys):
    utterance = record(tmp_path, tone_waveform("a"))
    write_manifest(tmp_path / "test.json", [Utterance(utterance.audio_filepath, 0.2, "")])
    line = refused(models, tmp_path, capsys, test_data=tmp_path / "test.json")
    assert "no reference words" in line


def test_output_that_cannot_be_written(models, data, tmp_path, capsys):
    assert "a folder" in refused(models, tmp_path, capsys, test_data=data, output_file=tmp_path)
    file = tmp_path / "file"
    file.touch()
    refused(models, tmp_path, capsys, test_data=data, output_file=file / "r.json")
    assert file.read_bytes() == b""


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such result file"), ("{", "not a JSON file"), ("[1]", "not a result")],
)
def test_a_comparison_with_no_result(models, data, tmp_path, capsys, content, message):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    assert message in refused(models, tmp_path, capsys, test_data=data, compare=path)


def test_an_old_result_stays_when_the_run_fails(models, tmp_path, capsys):
    output = tmp_path / "r.json"
    output.write_text("old")
    assert run(models, tmp_path / "absent", "--output_file", output) == 2
    assert output.read_text() == "old"


@pytest.mark.parametrize("flag", ["--batch_size=0", "--threads=-1", "--limit=-2"])
def test_flags_out_of_range(models, data, flag, capsys):
    assert run(models, data, flag) == 2
    assert flag.split("=")[0] in capsys.readouterr().err


# ---- the machine and real speech ----------------------------------------------------------------


def test_paths_are_written_without_the_machine(monkeypatch, tmp_path):
    here = tmp_path / "work" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for given, written in [
        ("models/a.pt", "models/a.pt"), ("--threads", "--threads"),
        (f"{here}/a/b.pt", "a/b.pt"), (f"{here.parent}/data", "../data"),
        ("/far/away/runs/a.pt", ".../runs/a.pt"), ("/", ".../"),
    ]:  # fmt: skip
        assert provenance.portable_path(given) == written
    command = provenance.command_line("evaluate.py", ["--a", "two words", "/x/y/z"])
    assert command == "python evaluate.py --a 'two words' .../y/z"


def test_the_machine_is_described():
    found = machine.describe_machine()
    assert json.loads(json.dumps(found)) == found
    assert found["processor"]
    assert found["memory"] > 1e8
    assert found["torch"] == torch.__version__
    assert machine.busy_note(0.0) == ""
    assert "busy" in machine.busy_note(100.0)


@pytest.mark.skipif(not (CORPORA / "an4" / "test.json").exists(), reason=f"no an4 in {CORPORA}")
def test_real_speech(models):
    utterances = read_test_data(CORPORA / "an4" / "test.json")[:4]
    result = evaluate(models["onnx"], utterances, threads=1, measure_latency=False)
    assert result["words"] == sum(len(u.text.split()) for u in utterances)
    assert len(result["utterances"]) == 4


def test_two_processes_hear_what_one_hears(tiny_checkpoint, tmp_path):
    data = write_corpus(tmp_path / "data", per_text=1) / "dev.json"
    flags = ["--model_path", tiny_checkpoint, "--test_data", data, "--no_speed", "--threads", 1]
    assert main([*map(str, flags), "--output_path", str(tmp_path / "one.json")]) == 0
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "evaluate.py", *flags, "--output_path", tmp_path / "two.json",
    ]  # fmt: skip
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("WER") == 1  # only the first process speaks
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert two["utterances"] == one["utterances"]
    assert len(one["utterances"]) > 2
