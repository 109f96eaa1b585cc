"""The report of a pipeline: a row a stage, plots, and whether targets are met, computed.

    final_report.json, final_report.md, final_report.png

Accuracy is 1 - WER; what is kept of it is compared with the first stage's, the teacher's. Speed is
that of the .onnx files, measured side by side.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from asr.runtime.cli import number
from asr.runtime.files import write_atomically, write_json

NAME = "final_report"
FIGURES, SPEED = "figures.json", "speed.json"  # of a stage, and of all
NAN = math.nan


@dataclass(frozen=True)
class Stage:
    """Figures of one model; NaN where they were not measured."""

    name: str
    bytes: int  # of the .pt
    parameters: int
    onnx_bytes: float = NAN
    flops_per_second: float = NAN  # of audio
    wer: float = NAN
    wer_interval: tuple[float, float] = (NAN, NAN)
    cer: float = NAN
    cer_interval: tuple[float, float] = (NAN, NAN)
    latency: float = NAN  # seconds
    peak_rss: float = NAN  # bytes
    test_data: str = ""


@dataclass(frozen=True)
class Targets:
    """What the last stage is to reach; 0 where nothing is asked."""

    size_reduction: float = 0.0  # share of the first stage's bytes that goes
    accuracy: float = 0.0  # share of the first stage's accuracy that stays
    latency: float = 0.0  # seconds, at most
    megabytes: float = 0.0  # at most
    wer: float = 0.0  # at most

    def __post_init__(self) -> None:
        for name, most in (("size_reduction", 1.0), ("accuracy", 1.0), ("wer", 1.0)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"target {name} {getattr(self, name)} must lie in [0, {most:g}]")
        for name in ("latency", "megabytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"target {name} {getattr(self, name)} must not be below 0")


FLAGS = {  # of commands: target, help, factor from the flag's unit
    "target_size_reduction": ("size_reduction", "share of the .pt's bytes that is to go", 1.0),
    "target_accuracy": ("accuracy", "share of the accuracy (1 - WER) that is to stay", 1.0),
    "target_latency_ms": ("latency", "most milliseconds for 10 s of audio", 1e-3),
    "target_megabytes": ("megabytes", "most megabytes of the .pt", 1.0),
    "target_wer": ("wer", "highest WER, such as 0.05", 1.0),
}


def add_targets(parser: argparse._ActionsContainer) -> None:
    """Adds a flag for each target."""
    for flag, (_, text, _) in FLAGS.items():
        parser.add_argument(f"--{flag}", type=number, help=text)


def targets_from(given: Mapping[str, Any]) -> Targets:
    """The targets by the names of their flags, other names passed over; ValueError."""
    return Targets(**{name: (given.get(flag) or 0) * by for flag, (name, _, by) in FLAGS.items()})


def stage_from_json(name: str, figures: dict[str, Any]) -> Stage:
    """A stage from figures, of which those that a stage has no place for are left out."""
    known = {f.name for f in fields(Stage)} - {"name"}
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in figures.items() if k in known
    }
    return Stage(name, **values)


def read_stages(folder: Path) -> list[Stage]:
    """The stages of a pipeline's folder, in order; ValueError where there are none."""
    found = {path.parent.name: json.loads(path.read_text(encoding="utf-8"))
             for path in folder.glob(f"*/{FIGURES}")}  # fmt: skip
    if not found:
        raise ValueError(f"{folder}: holds no stages; compress.py --recipe makes such a folder")
    if (folder / SPEED).exists():
        times = json.loads((folder / SPEED).read_text(encoding="utf-8"))["stages"]
        for row in times:
            found.get(row["stage"], {}).update(row)
    names = sorted(found, key=lambda name: int(name.partition("_")[0]))
    return [stage_from_json(name, found[name]) for name in names]


def derived(stage: Stage, first: Stage) -> dict[str, float]:
    """What follows from a stage's figures and the first one's."""
    accuracy = 1 - stage.wer
    return {
        "size_reduction": 1 - stage.bytes / first.bytes,
        "smaller": first.bytes / stage.bytes,
        "onnx_smaller": first.onnx_bytes / stage.onnx_bytes,
        "accuracy": accuracy,
        "retention": accuracy / (1 - first.wer) if first.wer < 1 else NAN,
        "speedup": first.latency / stage.latency,
        "flops_share": stage.flops_per_second / first.flops_per_second,
    }


def check_targets(stage: Stage, first: Stage, targets: Targets) -> list[dict[str, Any]]:
    """For each target that is asked: what, wanted, reached, met, and by how much.

    `margin` is positive where it is met, in the target's own unit.
    """
    found = derived(stage, first)
    reached = {  # value, and whether more is better
        "size_reduction": (found["size_reduction"], True),
        "accuracy": (found["retention"], True),
        "latency": (stage.latency, False),
        "megabytes": (stage.bytes / 1e6, False),
        "wer": (stage.wer, False),
    }
    rows = []
    for name, (value, more) in reached.items():
        wanted = getattr(targets, name)
        if wanted:
            margin = value - wanted if more else wanted - value
            rows.append({"target": name, "wanted": wanted, "reached": value,
                         "met": bool(margin >= 0), "margin": margin})  # fmt: skip
    return rows


def as_json(stages: Sequence[Stage], targets: Targets) -> dict[str, Any]:
    """The report's figures, JSON types; NaN becomes null."""
    first = stages[0]
    rows = [asdict(stage) | derived(stage, first) for stage in stages]
    kept = [s.name for s in stages if all(r["met"] for r in check_targets(s, first, targets))]
    checked = check_targets(stages[-1], first, targets)
    result = {"stages": rows, "targets": checked, "stages_that_meet_all": kept if checked else []}
    found: dict[str, Any] = json.loads(json.dumps(result), parse_constant=lambda _: None)
    return found


FORMS = {  # heading, form, factor
    "size_reduction": ("size", "{:.1f} % smaller", 100),
    "accuracy": ("accuracy kept", "{:.1f} %", 100),
    "latency": ("latency", "{:.1f} ms", 1000), "megabytes": ("file", "{:.2f} MB", 1),
    "wer": ("WER", "{:.2f} %", 100),
}  # fmt: skip


def markdown(stages: Sequence[Stage], targets: Targets, about: Sequence[str] = ()) -> str:
    """The table, the targets and what the columns mean."""
    first = stages[0]
    head = (
        "stage", ".pt MB", "smaller", ".onnx MB", "smaller", "parameters", "WER", "CER", "accuracy",
        "kept", "ms", "faster", "GFLOPs/s", "memory MB",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " --: |" * (len(head) - 1)]
    for stage in stages:
        d = derived(stage, first)
        cells = (
            stage.name, _form("{:.2f}", stage.bytes / 1e6), _form("{:.2f}", d["smaller"]),
            _form("{:.2f}", stage.onnx_bytes / 1e6), _form("{:.2f}", d["onnx_smaller"]),
            _form("{:.2f} M", stage.parameters / 1e6),
            _interval(stage.wer, stage.wer_interval), _interval(stage.cer, stage.cer_interval),
            _form("{:.2f} %", 100 * d["accuracy"]), _form("{:.1f} %", 100 * d["retention"]),
            _form("{:.1f}", 1e3 * stage.latency), _form("{:.2f}", d["speedup"]),
            _form("{:.3f}", stage.flops_per_second / 1e9), _form("{:.0f}", stage.peak_rss / 1e6),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *_target_lines(stages, targets), NOTES, *about]
    return "\n".join(lines) + "\n"


def _target_lines(stages: Sequence[Stage], targets: Targets) -> list[str]:
    rows = check_targets(stages[-1], stages[0], targets)
    if not rows:
        return []
    lines = [f"Targets, of the last stage ({stages[-1].name}):", "",
             "| target | wanted | reached | | by |", "| --- | --: | --: | --- | --: |"]  # fmt: skip
    for row in rows:
        name, form, factor = FORMS[row["target"]]
        wanted, reached, margin = (
            _form(form, factor * row[k]) for k in ("wanted", "reached", "margin")
        )
        met = "met" if row["met"] else "not met"
        lines.append(f"| {name} | {wanted} | {reached} | {met} | {margin} |")
    return [*lines, ""]


NOTES = """\
- *smaller*, *faster*: how many times, against the first stage.
- *WER*, *CER*: of the `.onnx`, greedy, with 95 % intervals; *accuracy*: 1 - WER; *kept*: the
  share of the first stage's accuracy.
- *ms*: median from waveform to text of 10 s of audio, one thread, all stages' `.onnx` in turn;
  *memory*: the highest of the process.
- *GFLOPs/s*: products of matrices and convolutions for a second of audio, in thousand millions, on
  the graph that runs: zeros count, shared blocks count each time they run."""


def _form(form: str, value: float) -> str:
    return "–" if math.isnan(value) else form.format(value)


def _interval(rate: float, interval: tuple[float, float]) -> str:
    if math.isnan(rate):
        return "–"
    low, high = interval
    return f"{100 * rate:.2f} % ({100 * low:.1f} to {100 * high:.1f})"


def plot(stages: Sequence[Stage], path: Path) -> bool:
    """Accuracy against GFLOPs, with points as large as the file, and against latency.

    Returns whether there was anything to draw.
    """
    shown = [s for s in stages if not math.isnan(s.wer)]
    if not shown:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), dpi=130, layout="constrained")
    largest = max(s.bytes for s in shown)
    sides = (
        ("GFLOPs for a second of audio", [s.flops_per_second / 1e9 for s in shown]),
        ("latency of 10 s, one thread (ms)", [1e3 * s.latency for s in shown]),
    )
    for axis, (label, values) in zip(axes, sides, strict=True):
        rates = [100 * (1 - s.wer) for s in shown]
        sizes = [30 + 900 * s.bytes / largest for s in shown]
        axis.scatter(values, rates, s=sizes, alpha=0.5, color="tab:blue")
        for stage, x, y in zip(shown, values, rates, strict=True):
            if not math.isnan(x):
                axis.annotate(f"{stage.name}\n{stage.bytes / 1e6:.2f} MB", (x, y), fontsize=8,
                              ha="center", va="center")  # fmt: skip
        axis.set_xlabel(label)
        axis.set_ylabel("accuracy, 1 - WER (%)")
        axis.margins(0.2)
        axis.grid(True, alpha=0.3)
    figure.savefig(path, dpi=figure.dpi)
    pyplot.close(figure)
    return True


def write(
    folder: Path, stages: Sequence[Stage], targets: Targets, about: dict[str, Any]
) -> list[Path]:
    """Writes the three files (no plot where there is no WER); `about` goes into the JSON."""
    written = [folder / f"{NAME}.json", folder / f"{NAME}.md"]
    write_json(written[0], about | as_json(stages, targets))
    lines = [f"- Command: `{about['command']}` (commit {about['commit']})."] if about else []
    write_atomically(written[1], f"# Final report\n\n{markdown(stages, targets, lines)}")
    if plot(stages, folder / f"{NAME}.png"):
        written.append(folder / f"{NAME}.png")
    return written
