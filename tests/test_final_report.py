"""The report's arithmetic on made figures: what is kept, what is met and by how much."""

import json
import math

import pytest

from asr.measure.final_report import (
    Stage,
    Targets,
    check_targets,
    derived,
    markdown,
    stage_from_json,
    write,
)

FIRST = Stage(
    "0_source", 8_000_000, 2_000_000, 8_100_000, 4e9, 0.10, (0.08, 0.12), 0.05, (0.04, 0.06), 0.080,
    100e6,
)  # fmt: skip
LAST = Stage(
    "1_int8", 1_000_000, 1_000_000, 1_350_000, 1e9, 0.19, (0.16, 0.22), 0.09, (0.07, 0.11), 0.020,
    80e6,
)  # fmt: skip


def test_what_follows_from_the_figures():
    found = derived(LAST, FIRST)
    assert found["size_reduction"] == pytest.approx(0.875)
    assert found["smaller"] == pytest.approx(8)
    assert found["onnx_smaller"] == pytest.approx(6)
    assert found["accuracy"] == pytest.approx(0.81)
    assert found["retention"] == pytest.approx(0.9)
    assert found["speedup"] == pytest.approx(4)
    assert found["flops_share"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("asked", "met", "margin"),
    [
        ({"size_reduction": 0.5}, True, 0.375),
        ({"size_reduction": 0.9}, False, -0.025),
        ({"accuracy": 0.85}, True, 0.05),
        ({"accuracy": 0.95}, False, -0.05),
        ({"latency": 0.030}, True, 0.010),
        ({"latency": 0.015}, False, -0.005),
        ({"megabytes": 1.5}, True, 0.5),
        ({"megabytes": 0.5}, False, -0.5),
        ({"wer": 0.20}, True, 0.01),
        ({"wer": 0.15}, False, -0.04),
    ],
)
def test_targets_are_met_or_not_by_so_much(asked, met, margin):
    (row,) = check_targets(LAST, FIRST, Targets(**asked))
    assert row["met"] is met
    assert row["margin"] == pytest.approx(margin)
    text = markdown([FIRST, LAST], Targets(**asked))
    assert f"| {'met' if met else 'not met'} |" in text


def test_what_was_not_measured_meets_nothing_and_is_a_dash():
    bare = Stage("1_pruning", 1_000_000, 500_000)
    rows = check_targets(bare, bare, Targets(accuracy=0.5, latency=1.0, size_reduction=0.1))
    assert [row["met"] for row in rows] == [False, False, False]
    assert "| – | – | – |" in markdown([bare], Targets())


@pytest.mark.parametrize(
    "asked", [{"accuracy": 1.5}, {"size_reduction": -0.1}, {"latency": -1}, {"megabytes": -2}]
)
def test_impossible_targets_are_refused(asked):
    with pytest.raises(ValueError, match="target"):
        Targets(**asked)


def test_files_are_whole_and_json(tmp_path):
    bare = Stage("2_more", 500_000, 500_000)
    about = {"command": "python compress.py", "commit": "abc"}
    targets = Targets(size_reduction=0.5)
    written = write(tmp_path, [FIRST, LAST, bare], targets, about)
    assert [p.name for p in written] == [f"final_report.{k}" for k in ("json", "md", "png")]
    assert all(p.stat().st_size for p in written)
    found = json.loads(written[0].read_text(), parse_constant=pytest.fail)
    assert found["stages"][2]["wer"] is None
    assert found["stages"][1]["retention"] == pytest.approx(0.9)
    assert found["targets"][0]["met"] is True
    assert found["stages_that_meet_all"] == ["1_int8", "2_more"]
    assert found["commit"] == "abc"


def test_a_stage_comes_from_its_figures():
    figures = {
        "bytes": 10, "onnx_bytes": 20, "parameters": 30, "wer": 0.5, "wer_interval": [0.4, 0.6],
        "words": 7,
    }  # fmt: skip
    stage = stage_from_json("x", figures)
    assert (stage.bytes, stage.wer_interval, stage.wer) == (10, (0.4, 0.6), 0.5)
    assert math.isnan(stage.latency)
