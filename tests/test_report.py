"""The report: what is read, compared, refused, inserted and drawn."""

import itertools
import json
import math
import runpy
from pathlib import Path

import pytest

from asr.measure import plots, report, results

ROOT = Path(__file__).parents[1]
DESIGN = ROOT / "experiments" / "design.json"


def write(path, wer, size, latency=None, model="m.pt", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = {
        "wer": wer, "bytes": size, "model": model, "test_data": "test",
        "command": f"python {path.stem}.py", "commit": "abc", "seed": 0, **more,
    }  # fmt: skip
    if latency is not None:
        contents["latency_p50"] = latency
    path.write_text(json.dumps(contents))


def against(path, low=0.0, high=0.0, **more):
    """What evaluate.py --compare writes."""
    return {"other": path, "wer": {"delta": 0.0, "interval": [low, high]}, **more}


@pytest.fixture
def folder(tmp_path):
    tmp = tmp_path / "an4"
    write(tmp / "float_pt.json", 0.2, 50_000_000, 0.4, peak_rss=3e8)
    write(tmp / "float_onnx.json", 0.2, 51_000_000, 0.3, "m.onnx", peak_rss=1e8)
    write(tmp / "int8_pt.json", 0.21, 12_500_000, 0.2, peak_rss=2e8,
          comparison=against("an4/float_pt.json", -0.005, 0.0251))  # fmt: skip
    write(tmp / "int8_onnx.json", 0.22, 13_000_000, 0.15, "m.onnx", peak_rss=1.2e8,
          comparison=against("elsewhere/an4/int8_pt.json", identical=0.75))  # fmt: skip
    write(tmp / "fp16.json", 0.2, 25_000_000)
    write(tmp / "low_rank_64.json", 0.3, 20_000_000, 0.1, peak_rss=5e7)
    (tmp / "other.json").write_text("{}")
    return tmp


def main(*arguments):
    script = ROOT / "scripts" / "report.py"
    return runpy.run_path(str(script))["main"]([str(a) for a in arguments])


def rows(text):
    """Cells by technique; the header's under its own first cell."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row for row in cells if row[0] != "---"}


def test_one_row_a_technique_by_size(folder):
    found = rows(report.markdown(results.read_results([folder])))
    assert list(found) == ["technique", "float", "fp16", "low_rank_64", "int8"]
    none = report.MISSING
    assert found["technique"] == [
        "technique", ".pt MB", "smaller", ".onnx MB", "smaller", "WER .pt", "WER .onnx", "ΔWER",
        "difference", "ms", "faster", "memory MB", "texts alike",
    ]  # fmt: skip
    assert found["float"][1:] == [
        "50.00", "1.00", "51.00", "1.00", "20.00 %", "20.00 %", none, none, "300.0", "1.00", "100",
        none,
    ]  # fmt: skip
    assert found["int8"][1:] == [
        "12.50", "4.00", "13.00", "3.92", "21.00 %", "22.00 %", "+5.0 %", "-0.50 to +2.51",
        "150.0", "2.00", "120", "75.0 %",
    ]  # fmt: skip
    assert found["fp16"][1:] == [
        "25.00",
        "2.00",
        none,
        none,
        "20.00 %",
        none,
        "+0.0 %",
        *[none] * 5,
    ]
    # of the .pt where there is no .onnx, against the float .pt
    assert found["low_rank_64"][9:12] == ["100.0 (.pt)", "4.00", "50"]


@pytest.mark.parametrize(
    "other", ["an4/int8_onnx.json", "libri/float_pt.json", "float_onnx.json", ""]
)
def test_an_interval_against_another_file_is_not_shown(folder, other):
    write(folder / "int8_pt.json", 0.21, 12_500_000, comparison=against(other, 0.1, 0.2))
    text = report.markdown(results.read_results([folder]))
    assert rows(text)["int8"][8] == report.MISSING


@pytest.mark.parametrize("other", ["float_pt.json", "../float_pt.json", ".../an4/float_pt.json"])
def test_the_float_file_is_known_from_other_folders(folder, other):
    write(folder / "int8_pt.json", 0.21, 12_500_000, comparison=against(other, 0.1, 0.2))
    text = report.markdown(results.read_results([folder]))
    assert rows(text)["int8"][8] == "+10.00 to +20.00"


@pytest.mark.parametrize(
    ("file", "model", "name"),
    [
        ("int8_pt.json", "m.pt", "int8"),
        ("int8_onnx.json", "m.onnx", "int8"),
        ("int8_onnx.json", "m.pt", "int8_onnx"),
        ("baseline/result.json", "m.pt", "baseline"),
        ("baseline/result_onnx.json", "m.onnx", "baseline"),
        ("plain.json", "m.onnx", "plain"),
    ],
)
def test_names(tmp_path, file, model, name):
    write(tmp_path / file, 0.2, 10, model=model)
    found = results.read_result(tmp_path / file)
    assert (found.name, found.kind) == (name, model.removeprefix("m."))
    write(tmp_path / file, 0.2, 10, model=model, name="given")
    assert results.read_result(tmp_path / file).name == "given"


def test_only_an_onnx(tmp_path):
    write(tmp_path / "float.json", 0.2, 20, 0.2)
    write(tmp_path / "int8.json", 0.3, 10, 0.1, "m.onnx")
    row = rows(report.markdown(results.read_results([tmp_path])))["int8"]
    assert row[1:5] == [report.MISSING, report.MISSING, "0.00", report.MISSING]
    assert row[9:11] == ["100.0", report.MISSING]  # not against the time of another kind


def heard(errors, texts):
    """Utterances of a result: two words each, so many of them wrong."""
    return [
        {"id": str(i), "duration": 1.0, "words": 2, "word_errors": wrong, "characters": 9,
         "character_errors": wrong, "digest": text}
        for i, (wrong, text) in enumerate(zip(errors, texts, strict=True))
    ]  # fmt: skip


def test_what_nobody_compared_is_computed_from_the_texts(tmp_path):
    """As in the demo: int8 has an .onnx alone, and no evaluation was told to --compare."""
    errors = [0, 1, 0, 1] * 10
    write(tmp_path / "baseline_pt.json", 0.25, 9, utterances=heard(errors, "abcd" * 10))
    same = {"model": "m.onnx", "utterances": heard(errors, "abcd" * 10)}
    write(tmp_path / "baseline_onnx.json", 0.25, 9, **same)
    worse = heard([1, 1, 0, 1] * 10, "xbcd" * 10)
    write(tmp_path / "int8_onnx.json", 0.375, 3, model="m.onnx", utterances=worse)
    found = rows(report.markdown(results.read_results([tmp_path])))
    row = dict(zip(found["technique"][7:], found["int8"][7:], strict=True))
    assert row["ΔWER"] == "+50.0 %"
    low, high = map(float, row["difference"].split(" to "))
    assert 0 < low < 12.5 < high < 25
    assert row["texts alike"] == "75.0 %"
    assert found["baseline"][-1] == "100.0 %"
    write(tmp_path / "int8_onnx.json", 0.375, 3, model="m.onnx", utterances=worse[1:])
    assert rows(report.markdown(results.read_results([tmp_path])))["int8"][-1] == "–"


def test_where_it_was_measured(folder):
    machine = {"processor": "Z80", "cores": 1, "torch": "2.0"}
    write(folder / "int8_pt.json", 0.2, 10, machine={**machine, "load_before": 0.5})
    write(folder / "fp16.json", 0.2, 10, machine={**machine, "load_before": 2.25}, commit="def")
    write(folder / "int8_onnx.json", 0.2, 10, model="m.onnx", machine={**machine, "cores": 2})
    text = report.markdown(results.read_results([folder]))
    assert "- Measured on: Z80, 1 core, torch 2.0; load before it 0.5 to 2.2." in text
    assert "- Measured on: Z80, 2 cores, torch 2.0.\n" in text
    folded = text.partition("<details>")[2].partition("</details>")[0]
    assert "- int8 (commit abc, seed 0): `python int8_pt.py`, `python int8_onnx.py`\n" in folded
    assert "- fp16 (commit def, seed 0): `python fp16.py`\n" in folded


def test_results_on_other_data_get_their_own_table(folder):
    write(folder / "elsewhere.json", 0.4, 50_000_000, test_data="test-other")
    text = report.markdown(results.read_results([folder]))
    other, test = text.partition("Test data: `test-other`\n")[2].split("Test data: `test`\n")
    assert list(rows(other)) == ["technique", "elsewhere"]
    assert {"float", "int8"} < rows(test).keys()


def test_the_baseline(folder, tmp_path):
    found = results.read_results([folder])
    assert results.find_baseline(found) == "float"
    assert results.find_baseline(found, "fp16") == "fp16"
    with pytest.raises(ValueError, match=r"no result is named 'x'; there are .*int8"):
        results.find_baseline(found, "x")
    write(folder / "float_padded.json", 0.2, 90_000_000)
    assert results.find_baseline(results.read_results([folder])) == "float"
    write(tmp_path / "b" / "small.json", 0.2, 10)
    write(tmp_path / "b" / "large.json", 0.2, 20)
    with pytest.raises(ValueError, match=r"which of the results .* --baseline: .*large"):
        results.find_baseline(results.read_results([tmp_path / "b"]))
    (only,) = results.read_results([tmp_path / "b" / "large.json"])
    assert results.find_baseline([only]) == "large"


def test_the_design_beside_ours(folder):
    write(folder / "int4_qat.json", 0.2, 10)
    write(folder / "low_rank.json", 0.3, 20_000_000, 0.1)
    reference = results.read_reference(DESIGN)
    text = report.markdown(results.read_results([folder]), reference=reference)
    found, none = rows(text.split("\nFrom ")[0]), report.MISSING
    places = [i for i, header in enumerate(found["technique"]) if header.startswith("design: ")]
    assert [found["technique"][i - 1] for i in places] == ["smaller", "ΔWER", "faster"]
    shown = {
        name: [row[i] for i in places] for name, row in found.items() if len(row) > max(places)
    }
    assert shown["int8"] == ["2.95", "+31.79 %", "1.14"]
    assert shown["low_rank"] == ["2.18", "+141.04 %", "1.37"]
    assert shown["float"] == ["1.00", none, "1.00"]
    assert shown["int4_qat"] == shown["low_rank_64"] == [none] * 3  # not of that study
    assert reference.source in text
    assert "| int8 | 97.70 | 2.95 | 28.81 % | +31.79 % | 0.3685 | 1.14 |" in text
    assert f"- {reference.notes[0]}" in text


def test_rates_of_each_set(tmp_path):
    def sets(*wers):
        return [
            {
                "test_data": f"data/{name}",
                "words": 4000,
                "wer": wer,
                "wer_interval": [wer - 0.01, wer + 0.01],
                "cer": wer / 4,
            }
            for name, wer in zip(("clean", "other"), wers, strict=True)
        ]

    write(tmp_path / "greedy_onnx.json", 0.3, 10, model="m.onnx", sets=sets(0.2, 0.4))
    write(tmp_path / "lm_onnx.json", 0.25, 10, model="m.onnx", sets=sets(0.15, 0.36))
    found = results.read_results([tmp_path])
    text = report.by_set(found)
    shown = rows(text)
    assert shown["technique"][1:] == [
        "clean, 4,000 words: WER (95 %), CER",
        "other, 4,000 words: WER (95 %), CER",
    ]
    assert shown["lm"] == ["lm", "15.0 % (14.0 to 16.0), 3.8 %", "36.0 % (35.0 to 37.0), 9.0 %"]
    assert "python lm_onnx.py" in text
    assert text.splitlines()[0] in report.markdown(found, "greedy")
    with pytest.raises(ValueError, match="several --test_data"):
        report.by_set([])


def test_times_of_a_run_side_by_side(folder, tmp_path):
    """They take the place of those that were measured one after another."""
    rows_ = [{"model": "m.onnx", "threads": n, "latency": 0.1 * n, "peak_rss": 7e7} for n in (1, 2)]
    contents = {"results": rows_, "command": "python bench", "commit": "abc"}
    (tmp_path / "speed.json").write_text(json.dumps(contents))
    speed = results.read_speed(tmp_path / "speed.json")
    text = report.markdown(results.read_results([folder]), speed=speed)
    found = rows(text)
    place = found["technique"].index("ms")
    assert found["int8"][place : place + 3] == ["100.0", "1.00", "70"]
    assert found["low_rank_64"][place] == report.MISSING  # its .pt was not among them
    assert "`python bench` (commit abc)" in text
    with pytest.raises(ValueError, match=r"low_rank_64\.json: no times of"):
        results.read_speed(folder / "low_rank_64.json")


def test_how_a_model_was_made(tmp_path):
    history = [
        {"step": "train", "config": {"epochs": 3, "seed": 1, "dropout": 0.1}, "commit": "abc"},
        {"step": "init", "sha256": 64 * "f"},
        {"step": "pruning", "config": {"sparsity": 0.5, "include": "*", "size_ratio": 0.0}},
    ]  # fmt: skip
    write(tmp_path / "float_pt.json", 0.3, 10, made_by=history[:2])
    write(tmp_path / "fp16_pt.json", 0.3, 8, made_by=history[1:])
    write(tmp_path / "small_pt.json", 0.3, 5, made_by=history)
    text = report.markdown(results.read_results([tmp_path]))
    start = "init from ffffffffffff"
    assert f"made by train (epochs 3, seed 1, commit abc), then {start}\n" in text
    assert "made from float by pruning (sparsity 0.5)\n" in text
    assert f"made by {start}, then pruning (sparsity 0.5)\n" in text


@pytest.mark.parametrize(
    "text", ["x", "[]", "{}", '{"source": "", "rows": {"a": 1}}',
             '{"source": "", "rows": {"a": {"size": 1}}}',
             '{"source": "", "rows": {"a": {"faster": "1"}}}']
)  # fmt: skip
def test_other_files_are_no_reference(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json: not reference figures .*design\.json"):
        results.read_reference(tmp_path / "a.json")


def test_a_section_is_replaced_and_nothing_else(folder, tmp_path):
    page = tmp_path / "page.md"
    before, after = "# Page\n<!-- results: an -->\nb\n<!-- end -->\n", "<!-- end -->\n\nlast line"
    page.write_text(before + "<!-- results: an4 -->\nold\n" + after)
    out = tmp_path / "out"
    command = folder, "--insert", page, "--section", "an4", "--output_dir", out
    assert main(*command) == 0
    text = page.read_text()
    assert text.startswith(before)
    assert text.endswith(after)
    assert "old" not in text
    assert "| int8 |" in text
    assert {path.name for path in out.iterdir()} == set(plots.PLOTS)
    assert main(*command) == 0
    assert page.read_text() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 lines are '<!-- results: an4 -->', not one; write it and '<!-- end -->' below"),
        ("<!-- results: an4 -->\n<!-- end -->\n" * 2, "2 lines are"),
        ("<!-- end -->\n<!-- results: an4 -->\n", "no line '<!-- end -->' after '<!-- results: an"),
        (
            "<!-- results: an4 -->\n<!-- results: b -->\n<!-- end -->",
            "no line '<!-- end -->' after",
        ),
    ],
)
def test_missing_markers_are_named(folder, tmp_path, capsys, text, message):
    page = tmp_path / "page.md"
    page.write_text(text)
    assert main(folder, "--insert", page, "--section", "an4") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {page}: {message}")
    assert error.count("\n") == 1
    assert page.read_text() == text


def test_pareto_front_against_all_pairs():
    points = [(5, 1), (1, 5), (2, 2), (3, 3), (2, 4), (4, 1.5), (6, 1), (1, 6)]
    front = {points[i] for i in plots.pareto(points)}
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] <= p[1]}
    assert front == set(points) - beaten


def test_a_front_over_noise_is_no_front():
    points = [(1.0, 5.0), (2.0, 4.5), (3.0, 2.0), (4.0, 1.9)]
    noisy = [(y - 1, y + 1) for _, y in points]
    assert plots.pareto(points) == [0, 1, 2, 3]
    assert plots.pareto(points, noisy) == [0, 2]
    assert plots.pareto(points, [(0, 9)] * 4) == [0]


def test_labels_of_crowded_points_are_all_written_side_by_side():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(8, 5))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xlim=(0, 10), ylim=(0, 10))
    names = [f"technique_{i}" for i in range(9)]
    plots._label(axes, [*names, names[0]], [(5 + i / 20, 5) for i in range(9)] + [(5, 5.1)])
    assert sorted(text.get_text() for text in axes.texts) == names  # two near points: one label
    boxes = [Text.get_window_extent(text).extents for text in axes.texts]
    assert not any(plots._overlap(a, b) for a, b in itertools.combinations(boxes, 2))


def test_the_command_writes_table_and_plots(folder, capsys):
    assert main(folder, "--output_dir", folder / "out") == 0
    assert (folder / "out" / "report.md").read_text().startswith("# Results\n\nTest data")
    for name in plots.PLOTS:
        assert (folder / "out" / name).read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(folder / "int8_pt.json", "--reference", DESIGN) == 0
    assert "| int8 | 12.50 | 1.00 | 2.95 |" in capsys.readouterr().out


def test_nothing_to_draw_without_times(tmp_path):
    write(tmp_path / "a.json", 0.2, 10)
    found = results.read_results([tmp_path])
    assert math.isnan(found[0].latency)
    assert not plots.plot(found, tmp_path / "wer_latency.png")
    assert plots.plot(found, tmp_path / "wer_size.png")


@pytest.mark.parametrize(
    "kind", ["missing", "not json", "no result", "empty folder", "baseline", "twice", "section"]
)
def test_mistakes_are_one_line(tmp_path, capsys, kind):
    path = tmp_path / "a.json"
    more = {"baseline": ["--baseline", "x"], "section": ["--section", "x"]}.get(kind, [])
    if kind == "not json":
        path.write_text("wer")
    elif kind == "no result":
        path.write_text("[1]")
    elif kind == "empty folder":
        path.mkdir()
    elif kind != "missing":
        write(path, 0.2, 10)
    if kind == "twice":
        write(tmp_path / "a_pt.json", 0.2, 10)
        more = [tmp_path / "a_pt.json"]
    assert main(path, *more, "--output_dir", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
