"""The report: what is read, compared, refused and drawn."""

import json
import math
import runpy
from pathlib import Path

import pytest

from asr import report

SCRIPT = Path(__file__).parents[1] / "scripts" / "report.py"


def write(path, wer, size, latency=None, model="m.pt", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = {
        "wer": wer, "bytes": size, "model": model, "test_data": "test", "command": "python x.py",
        "commit": "abc", "seed": 0, "wer_interval": [wer - 0.01, wer + 0.01], **more,
    }  # fmt: skip
    if latency is not None:
        contents["latency_p50"] = latency
    path.write_text(json.dumps(contents))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "baseline" / "result.json", 0.2, 50_000_000, 0.4)
    write(tmp_path / "int8.json", 0.21, 12_500_000, 0.2)
    write(tmp_path / "onnx" / "baseline.json", 0.2, 51_000_000, 0.3, model="m.onnx")
    write(tmp_path / "onnx" / "int8.json", 0.21, 13_000_000, 0.15, model="m.onnx")
    write(tmp_path / "fp16.json", 0.2, 25_000_000)
    (tmp_path / "other.json").write_text("{}")
    return tmp_path


def main(*arguments):
    return runpy.run_path(str(SCRIPT))["main"]([str(a) for a in arguments])


def rows(text):
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {(row[0], row[1]): row for row in cells[2:]}


def test_the_table_compares_each_kind_with_its_own_baseline(folder):
    found = rows(report.markdown(report.read_results([folder])))
    assert next(iter(found)) == ("baseline", ".pt")
    assert len(found) == 5
    size, ratio, wer, interval, delta, latency, speedup, _ = found["int8", ".pt"][2:]
    assert (size, ratio, wer, interval) == ("12.50", "4.00", "21.00%", "20.0% to 22.0%")
    assert (delta, latency, speedup) == ("+5.0%", "200", "2.00")
    assert found["int8", ".onnx"][3] == f"{51 / 13:.2f}"
    assert found["int8", ".onnx"][8] == "2.00"
    assert found["fp16", ".pt"][7:9] == [report.MISSING, report.MISSING]
    assert found["baseline", ".pt"][6] == report.MISSING


def test_commands_and_commits_are_named(folder):
    text = report.markdown(report.read_results([folder]))
    assert "- int8 (onnx), commit abc, seed 0: `python x.py`" in text


def test_results_on_other_data_get_their_own_table(folder, tmp_path):
    write(folder / "elsewhere.json", 0.4, 50_000_000, test_data="test-other")
    text = report.markdown(report.read_results([folder]))
    assert "## test\n" in text
    assert "## test-other\n" in text


def test_a_named_baseline_and_an_unknown_one(folder):
    results = report.read_results([folder])
    assert report.find_baseline(results, "fp16")["pt"].name == "fp16"
    with pytest.raises(ValueError, match=r"no result is named 'x'; there are .*int8"):
        report.find_baseline(results, "x")


def test_the_largest_file_is_the_baseline_where_no_name_tells(tmp_path):
    write(tmp_path / "a.json", 0.2, 10)
    write(tmp_path / "b.json", 0.2, 20)
    assert report.find_baseline(report.read_results([tmp_path]), "")["pt"].name == "b"


def test_pareto_front_against_all_pairs():
    points = [(5, 1), (1, 5), (2, 2), (3, 3), (2, 4), (4, 1.5), (6, 1), (1, 6)]
    front = {points[i] for i in report.pareto(points)}
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] <= p[1]}
    assert front == set(points) - beaten


def test_the_command_writes_table_and_plots(folder, capsys):
    assert main(folder, "--output_dir", folder / "out") == 0
    assert (folder / "out" / "report.md").read_text().startswith("# Results")
    for name in report.PLOTS:
        assert (folder / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert main(folder / "int8.json") == 0
    assert "| int8 | .pt | 12.50 |" in capsys.readouterr().out


def test_nothing_to_draw_without_times(tmp_path):
    write(tmp_path / "a.json", 0.2, 10)
    results = report.read_results([tmp_path])
    assert math.isnan(results[0].latency)
    assert not report.plot(results, tmp_path / "wer_latency.png")
    assert report.plot(results, tmp_path / "wer_size.png")


@pytest.mark.parametrize("kind", ["missing", "not json", "no result", "empty folder", "baseline"])
def test_mistakes_are_one_line(tmp_path, capsys, kind):
    path = tmp_path / "a.json"
    if kind == "not json":
        path.write_text("wer")
    elif kind == "no result":
        path.write_text("[1]")
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "baseline":
        write(path, 0.2, 10)
    more = ["--baseline", "x"] if kind == "baseline" else []
    assert main(path, "--output_dir", tmp_path / "out", *more) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
