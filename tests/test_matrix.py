"""Teachers and students: the table's arithmetic, the rules of its choices, the command."""

import json
import math

import numpy as np
import pytest

from asr.measure import matrix
from asr.measure.matrix import Row, choices, markdown
from scripts import distillation_matrix


def row(student, wer, size, speedup, int8=0, int8_speedup=math.nan):
    return Row("t", student, wer, wer / 2, 1000, size, int8, 0.01, speedup, int8_speedup, 1e9,
               0.9, 0.8, 0.7, 0.6)  # fmt: skip


ROWS = [
    row("half", 0.105, 4_000_000, 1.9, 1_100_000, 2.4),
    row("shared", 0.109, 1_500_000, 1.0, 500_000, 1.3),
    row("tiny", 0.200, 900_000, 4.0, 300_000, 5.0),
    row("whole", 0.100, 8_000_000, 1.0),
]


def test_uses_follow_from_their_rules():
    assert choices(ROWS) == {
        "fastest": "tiny of t", "smallest": "tiny of t", "most accurate": "whole of t",
        "server": "half of t", "device": "shared of t",
    }  # fmt: skip
    text = markdown(ROWS)
    assert "| whole | 10.00% | 5.00% | 0.00 M | 8.00 | – | 10.0 | 1.00 | – |" in text
    assert "at most 1.1 times the lowest" in text


def test_the_heat_map_is_drawn(tmp_path):
    matrix.heat_map(ROWS, tmp_path / "m.png")
    assert (tmp_path / "m.png").stat().st_size


def test_the_command(tiny_checkpoint, tiny_onnx, clip, tmp_path, capsys):
    """A model as its own student agrees with itself wholly."""
    plan = tmp_path / "plan.json"
    pair = {"model": str(tiny_checkpoint), "onnx": str(tiny_onnx)}
    plan.write_text(json.dumps({
        "teachers": {"a": pair}, "students": [{"name": "b", "teacher": "a", **pair}],
    }))  # fmt: skip
    manifest = tmp_path / "test.json"
    manifest.write_text(json.dumps({"audio_filepath": str(clip), "duration": 2.0, "text": "a b"}))
    flags = [str(plan), "--test_data", str(manifest), "--rounds", "2"]
    assert distillation_matrix.main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "matrix.json").read_text())
    (only,) = found["rows"]
    assert only["frames"] == only["words"] == only["utterances"] == 1
    assert np.isclose(only["speedup"], 1)
    assert only["int8_speedup"] is None
    assert found["uses"]["fastest"] == "b of a"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "matrix.json", "matrix.md", "matrix.png",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ('{"teachers": {}}', "'students' is missing"),
        ('{"teachers": {}, "students": []}', "no students"),
        ('{"teachers": {}, "students": [{"name": "b", "teacher": "x"}]}', "names no teacher"),
        ('{"teachers": {"a": {"model": "no.pt", "onnx": "no.onnx"}}, "students": []}', "no such"),
    ],
)
def test_bad_plans_are_one_line(text, message, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    plan.write_text(text)
    flags = [str(plan), "--test_data", "x", "--output_dir", str(tmp_path / "out")]
    assert distillation_matrix.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
