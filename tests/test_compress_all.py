"""scripts/compress_all.py: every row made once, a run that goes on, a table of them all."""

import json
import shutil
from functools import partial
from importlib import import_module

import pytest

from asr.measure.evaluation import evaluate_data
from compress import comparison
from compress.comparison import ROWS, chosen
from compress.finetuning import Options
from compress.registry import method
from tests.corpus import write_corpus

main = import_module("scripts.compress_all").main


def timed(paths, *_, **__):
    """Rows as of asr.measure.benchmark, without any measurement."""
    row = {"threads": 1, "latency": 0.1, "fastest": 0.1, "peak_rss": 1e8}
    return [row | {"model": str(path)} for path in paths]


@pytest.fixture
def flags(tmp_path, tiny_checkpoint, tiny_onnx, monkeypatch):
    """The command on two rows; its export takes no time, and no speed is measured."""
    exported = []

    def export(model, path):
        exported.append(model)
        shutil.copy(tiny_onnx, path)

    monkeypatch.setattr(comparison, "export_onnx", export)
    monkeypatch.setattr(comparison, "evaluate_data", partial(evaluate_data, limit=4))
    monkeypatch.setattr(comparison, "speed_of_noise", timed)
    data = write_corpus(tmp_path / "corpus") / "dev.json"
    (tmp_path / "out" / "float").mkdir(parents=True)
    command = [
        "--model_path", str(tiny_checkpoint), "--test_data", str(data), "--no_calibration",
        "--output_dir", str(tmp_path / "out"), "--rows", "fp16", "pruned_50_int8",
    ]  # fmt: skip
    return command, tmp_path / "out", exported


def test_rows_are_compressed_measured_and_reported(flags, capsys):
    command, out, exported = flags
    assert main(command) == 0
    names = ["float", "fp16", "pruned_50_int8"]
    assert [path.parent.name for path in exported[1:]] == names[1:]
    for name in names:
        assert all((out / f"{name}_{kind}.json").exists() for kind in ("pt", "onnx"))
    assert (out / "unstructured_50" / "model.pt").exists()  # from which the int8 one is made
    report = (out / "report.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in report for name in names)
    assert (out / "wer_size.png").exists()
    assert (out / "wer_latency.png").exists()
    assert "| 100.0 |" in report  # milliseconds, of speed.json
    assert "pruned_50_int8" in capsys.readouterr().out


def test_a_run_goes_on_where_it_was(flags, monkeypatch):
    command, out, exported = flags
    assert main(command) == 0
    (out / "pruned_50_int8_onnx.json").unlink()
    count = len(exported)
    monkeypatch.setattr(comparison, "compress", None)
    assert main(command) == 0
    assert len(exported) == count
    assert (out / "pruned_50_int8_onnx.json").exists()


def test_a_new_row_is_timed_beside_those_of_before(flags):
    command, out, _ = flags
    assert main(command) == 0
    assert main([*command, "int8"]) == 0
    rows = json.loads((out / "speed.json").read_text())["results"]
    assert [row["model"].split("/")[-2] for row in rows] == ["float", *command[-2:], "int8"]


def test_results_can_do_without_texts(flags):
    command, out, _ = flags
    assert main([*command, "--no_texts"]) == 0
    for path in out.glob("*_*.json"):
        assert "hypothesis" not in path.read_text()
        assert "confusions" not in path.read_text()
    other = json.loads((out / "fp16_onnx.json").read_text())["comparison"]["other"]
    assert other.endswith("fp16_pt.json")


def test_rows_that_change_most_train_four_times_as_long(tmp_path, monkeypatch):
    told = {}
    monkeypatch.setattr(
        comparison, "compress", lambda _, folder, **options: told.update({folder.name: options})
    )
    rows = comparison.Comparison(tmp_path / "model.pt", [], tmp_path, epochs=2, fine_tune_data="d")
    for name in ROWS:
        rows.compress(name)
    epochs = {name: options.get("fine_tune_epochs", 0) for name, options in told.items()}
    assert epochs["ternary_qat"] == 4 * epochs["int4_qat"] == 8
    assert epochs["int4"] == epochs["pruned_50_int8"] == 0
    assert {told[name]["fine_tune_data"] for name in told if epochs[name]} == {"d"}
    assert told["low_rank"]["hint_weight"] == 10


def test_rows_of_another_run_are_not_mixed_in(flags, capsys):
    command, _, _ = flags
    assert main(command) == 0
    assert main([*command, "--fine_tune_epochs", "1"]) == 2
    assert "about.json" in capsys.readouterr().err


def test_a_row_that_does_not_suit_the_model_is_left_out(flags, monkeypatch):
    command, out, _ = flags

    def refuse(*_, **__):
        raise comparison.UnchangedError("no layer becomes smaller")

    monkeypatch.setattr(comparison, "compress", refuse)
    assert main(command) == 0
    assert "fp16 is left out: no layer becomes smaller" in (out / "report.md").read_text()


def test_every_row_is_a_setting_of_its_method():
    for row in ROWS.values():
        method(row.method).Config(**row.options, **row.speech)
        Options(**row.tuning)
        assert row.of == "float" or row.of in ROWS


def test_rows_are_chosen():
    assert "int4_qat" not in chosen([], tuned=False)
    assert chosen([], tuned=True) == list(ROWS)
    with pytest.raises(ValueError, match="no row is named int5; there are fp16"):
        chosen(["int5"], tuned=True)
    with pytest.raises(ValueError, match="give --fine_tune_epochs"):
        chosen(["int4_qat"], tuned=False)
