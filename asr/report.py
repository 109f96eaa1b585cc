"""Results side by side: the table of the design document, and what a smaller or faster model costs.

Reads the JSON files of evaluate.py. A model is compared with the baseline of its own kind: bytes
and latency of a `.pt` with those of the baseline's `.pt`, of an `.onnx` with those of its `.onnx`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PLAIN_STEMS = ("result", "evaluation", "results")  # of files that are named by their folder
MISSING = "–"


@dataclass(frozen=True)
class Result:
    """What the report needs of a result file; NaN where it was not measured."""

    name: str
    kind: str  # "pt" or "onnx"
    wer: float
    bytes: int
    interval: tuple[float, float] = (math.nan, math.nan)
    latency: float = math.nan  # seconds, median
    peak_rss: float = math.nan
    params: int = 0
    test_data: str = ""
    about: dict[str, Any] = field(default_factory=dict)  # command, commit, seed, machine


def read_results(paths: Iterable[str | Path]) -> list[Result]:
    """The results in JSON files, and in the folders below those that are folders.

    A folder's files that are no results are passed over. Raises ValueError for a file that is none
    and where nothing is found.
    """
    results: list[Result] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = [read_result(p) for p in sorted(path.rglob("*.json")) if is_result(p)]
            if not found:
                raise ValueError(f"{path}: no result files below it; evaluate.py writes them")
            results += found
        else:
            results.append(read_result(path))
    return results


def is_result(path: Path) -> bool:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(contents, dict) and {"wer", "bytes"} <= contents.keys()


def read_result(path: Path) -> Result:
    """One result file; named by its key `name`, by its file, or if that says nothing its folder."""
    if not path.exists():
        raise ValueError(f"{path}: no such file; evaluate.py writes results")
    if not is_result(path):
        raise ValueError(f"{path}: not a result of evaluate.py (no wer and bytes in it)")
    contents = json.loads(path.read_text(encoding="utf-8"))
    name = path.parent.name if path.stem in PLAIN_STEMS else path.stem
    interval = contents.get("wer_interval") or (math.nan, math.nan)
    return Result(
        name=str(contents.get("name") or name),
        kind=Path(str(contents.get("model", ""))).suffix.removeprefix(".") or "pt",
        wer=float(contents["wer"]),
        bytes=int(contents["bytes"]),
        interval=(float(interval[0]), float(interval[1])),
        latency=float(contents.get("latency_p50", math.nan)),
        peak_rss=float(contents.get("peak_rss", math.nan)),
        params=int(contents.get("params", 0)),
        test_data=str(contents.get("test_data", "")),
        about={key: contents.get(key) for key in ("command", "commit", "seed", "machine")},
    )


def find_baseline(results: Sequence[Result], name: str) -> dict[str, Result]:
    """The baseline for each kind of file; where a kind has none, another kind's is used.

    Without a name: `baseline` or `float` in it, or the largest file. Raises ValueError.
    """
    if name:
        named = [r for r in results if r.name == name]
        if not named:
            known = ", ".join(dict.fromkeys(r.name for r in results))
            raise ValueError(f"no result is named {name!r}; there are {known}")
    else:
        named = [r for r in results if "baseline" in r.name.lower() or "float" in r.name.lower()]
        named = named or [max(results, key=lambda r: r.bytes)]
    return {r.kind: next((b for b in named if b.kind == r.kind), named[0]) for r in results}


def by_test_data(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Only what was measured on the same data can be compared."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.test_data, []).append(result)
    return groups


def markdown(results: Sequence[Result], baseline: str = "") -> str:
    """One table for each test set, then how it was measured."""
    parts = ["# Results"]
    for data, group in by_test_data(results).items():
        parts += [f"## {data}" if data else "", table(group, find_baseline(group, baseline))]
    parts.append(methods(results))
    return "\n\n".join(part for part in parts if part) + "\n"


def table(results: Sequence[Result], baselines: dict[str, Result]) -> str:
    """The design document's table: the baseline first, then by size; deltas are relative."""
    first = {id(b) for b in baselines.values()}
    ordered = sorted(results, key=lambda r: (r.kind != "pt", id(r) not in first, -r.bytes))
    rows = [
        "| technique | file | size (MB) | ratio | WER | 95 % interval | ΔWER | latency (ms) "
        "| speed-up | memory (MB) |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in ordered:
        base = baselines[r.kind]
        same = base.kind == r.kind  # bytes and times of a .pt say nothing about those of an .onnx
        ratio, speedup = (
            (base.bytes / r.bytes, base.latency / r.latency) if same else (math.nan, math.nan)
        )
        low, high = (number(value, "{:.1%}") for value in r.interval)
        delta = r.wer / base.wer - 1 if base.wer and r is not base else math.nan
        cells = [
            r.name, f".{r.kind}", f"{r.bytes / 1e6:.2f}", number(ratio, "{:.2f}"), f"{r.wer:.2%}",
            f"{low} to {high}", number(delta, "{:+.1%}"), number(1e3 * r.latency, "{:.0f}"),
            number(speedup, "{:.2f}"), number(r.peak_rss / 1e6, "{:.0f}"),
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def number(value: float, form: str) -> str:
    return MISSING if math.isnan(value) else form.format(value)


def methods(results: Sequence[Result]) -> str:
    """Where each number comes from."""
    lines = ["## How it was measured", ""]
    machines = dict.fromkeys(_machine(r) for r in results if r.about.get("machine"))
    lines += [f"- Machine: {machine}." for machine in machines]
    lines += [
        "- Latency: median over utterances, one thread, one utterance at a time, from waveform to "
        "text.",
        "- ΔWER is relative to the baseline of the same kind of file; ratio and speed-up likewise.",
        "",
    ]
    for r in results:
        if r.about.get("command"):
            lines.append(f"- {r.name} ({r.kind}), commit {r.about.get('commit') or MISSING}, seed "
                         f"{r.about.get('seed')}: `{r.about['command']}`")  # fmt: skip
    return "\n".join(lines)


def _machine(result: Result) -> str:
    machine = result.about["machine"]
    if not isinstance(machine, dict):
        return str(machine)
    versions = ", ".join(f"{k} {machine[k]}" for k in ("torch", "onnxruntime") if machine.get(k))
    return f"{machine.get('processor', '')}, {machine.get('cores', '?')} cores; {versions}"


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both coordinates (less is better), by x."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


PLOTS: dict[str, tuple[str, Callable[[Result], float]]] = {
    "wer_size.png": ("size of the file (MB)", lambda r: r.bytes / 1e6),
    "wer_latency.png": ("latency, one thread (ms)", lambda r: 1e3 * r.latency),
}


def plot(results: Sequence[Result], path: Path) -> bool:
    """WER against what the file's name says, each kind of file in its colour, with the front.

    Returns whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    label, value = PLOTS[path.name]
    shown = [r for r in results if not math.isnan(value(r))]
    if not shown:
        return False
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    points = [(value(r), 100 * r.wer) for r in shown]
    front = pareto(points)
    axes.step(*zip(*[points[i] for i in front], strict=True), where="post", color="0.6", lw=1.2,
              label="Pareto front", zorder=1)  # fmt: skip
    for kind, colour, marker in (("pt", "tab:blue", "o"), ("onnx", "tab:orange", "s")):
        mine = [p for p, r in zip(points, shown, strict=True) if r.kind == kind]
        if mine:
            axes.scatter(*zip(*mine, strict=True), color=colour, marker=marker, label=f".{kind}",
                         zorder=2)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("word error rate (%)")
    axes.margins(x=0.12, y=0.2)
    _readable_ticks(axes.xaxis)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(loc="best", frameon=False)
    _label(axes, [r.name for r in shown], points)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def _readable_ticks(axis: Any) -> None:
    """Plain numbers on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _label(axes: Any, names: Sequence[str], points: Sequence[tuple[float, float]]) -> None:
    """Names beside the points, moved up or down where they would cover something.

    A name with two points next to each other is written once, one without room not at all.
    """
    figure = axes.figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    pixels = [axes.transData.transform(point) for point in points]
    taken: list[tuple[float, float, float, float]] = [
        (x - 5, y - 5, x + 5, y + 5) for x, y in pixels
    ]
    written: list[tuple[str, float, float]] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        x, y = pixels[i]
        if any(names[i] == name and abs(x - u) + abs(y - v) < 40 for name, u, v in written):
            continue
        for offset in (6, -14, 18, -26, 30, -38, 42, -50, 54, -62):
            text = axes.annotate(
                names[i], points[i], xytext=(4, offset), textcoords="offset points", fontsize=8,
                arrowprops={"arrowstyle": "-", "color": "0.7", "lw": 0.6} if abs(offset) > 14
                else None,
            )  # fmt: skip
            box = text.get_window_extent(renderer).extents
            if not any(_overlap(box, other) for other in taken):
                taken.append(tuple(box))
                written.append((names[i], x, y))
                break
            text.remove()


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes (left, bottom, right, top) have a point in common."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
