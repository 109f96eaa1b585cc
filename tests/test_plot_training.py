"""The script plot_training: what it reads, how it tells runs apart, what it draws."""

import json
from importlib import import_module

import pytest

script = import_module("scripts.plot_training")


def write_log(folder, losses, wers=(), name="log.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    entries = [{"step": 10 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
    entries += [{"step": 100 * (i + 1), "dev_wer": w, "dev_cer": w / 2} for i, w in enumerate(wers)]
    (folder / name).write_text("".join(json.dumps(e) + "\n" for e in entries))
    return folder / name


@pytest.fixture
def axes(monkeypatch):
    """The axes of the figures that were drawn."""
    from matplotlib import pyplot

    drawn, subplots = [], pyplot.subplots

    def keep(*args, **kwargs):
        figure, axes = subplots(*args, **kwargs)
        drawn.extend(axes)
        return figure, axes

    monkeypatch.setattr(pyplot, "subplots", keep)
    return drawn


def test_runs_are_drawn_beside_each_other(tmp_path, axes, capsys):
    write_log(tmp_path / "a", [3, 2, 1], [0.9, 0.05])
    log = write_log(tmp_path / "b", [2, 1], [0.8, 0.1])
    out = tmp_path / "made" / "c.png"
    assert script.main([str(tmp_path / "a"), str(log), "--output_path", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    left, right = axes
    assert [list(line.get_ydata()) for line in left.lines] == [[3, 2, 1], [2, 1]]
    assert right.get_ylim()[1] < 120
    assert right.get_yscale() == "log"
    labels = [text.get_text() for text in left.figure.legends[0].get_texts()]
    assert labels == ["a, best dev WER 5.0 %", "b, best dev WER 10.0 %"]
    assert "a, b" in left.figure.get_suptitle()


def test_parts_of_one_run_follow_each_other(tmp_path, axes):
    logs = [
        write_log(tmp_path, [3, 2], name="log_1.jsonl"),
        write_log(tmp_path, [1], name="2.jsonl"),
    ]
    flags = ["--continued", "--output_path", str(tmp_path / "c.png"), "--title", "T"]
    assert script.main([*map(str, logs), *flags]) == 0
    (line,) = axes[0].lines
    assert list(line.get_xdata()) == [10, 20, 30]
    assert axes[0].figure.get_suptitle() == "T"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such log"),
        ("", "no training steps"),
        ("{\n", "line 1"),
        ('{"step": "x"}\n', "line 1"),
    ],
)
def test_mistakes_are_one_line(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    assert script.main([str(tmp_path), "--output_path", str(tmp_path / "c.png")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
