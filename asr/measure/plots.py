"""WER against size and against latency: one point for each file, and the front of the best ones.

The points have the 95 % intervals of their WER; the front falls only where that is beyond them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .results import Result

PLOTS: dict[str, tuple[str, str, Callable[[Result], float]]] = {
    "wer_size.png": (
        "Word error rate and size", "size of the file (MB)", lambda r: r.bytes / 1e6,
    ),
    "wer_latency.png": (
        "Word error rate and time", "latency, one thread (ms)", lambda r: 1e3 * r.latency,
    ),
}  # fmt: skip
NEAR = 90  # pixels between two points of a technique that share one label
DOT = 7  # pixels from a point's centre to its edge

Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels


def pareto(
    points: Sequence[tuple[float, float]], intervals: Sequence[tuple[float, float]] | None = None
) -> list[int]:
    """Indices of the points that no other beats in both coordinates (less is better), by x.

    With the `intervals` of the second coordinate, those of points that are better than the one
    before beyond both intervals: the others may be better by chance.
    """
    ranges = intervals or [(y, y) for _, y in points]
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or ranges[i][1] < ranges[front[-1]][0]:
            front.append(i)
    return front


def plot(results: Sequence[Result], path: Path) -> bool:
    """WER against what the file's name says, each kind of file in its colour, with the front.

    Returns whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    title, label, value = PLOTS[path.name]
    shown = [r for r in results if not math.isnan(value(r))]
    if not shown:
        return False
    figure, axes = pyplot.subplots(figsize=(9, 6.5), dpi=130, layout="constrained")
    points = [(value(r), 100 * r.wer) for r in shown]
    intervals = [
        (100 * r.wer_interval[0], 100 * r.wer_interval[1]) if r.wer_interval else (rate, rate)
        for r, (_, rate) in zip(shown, points, strict=True)
    ]
    front = pareto(points, intervals)
    if len(front) > 1:
        axes.step(*zip(*[points[i] for i in front], strict=True), where="post", color="0.6", lw=1.2,
                  label="front, where beyond the intervals", zorder=1)  # fmt: skip
    else:
        axes.plot([], [], " ", label="no front: differences within the intervals")
    for kind, colour, marker in (("pt", "tab:blue", "o"), ("onnx", "tab:orange", "s")):
        mine = [i for i, r in enumerate(shown) if r.kind == kind]
        if mine:
            x, y = zip(*(points[i] for i in mine), strict=True)
            axes.scatter(x, y, color=colour, marker=marker, label=f".{kind}", zorder=3)
            low, high = zip(*(intervals[i] for i in mine), strict=True)
            axes.vlines(x, low, high, color=colour, alpha=0.35, lw=1.2, zorder=2)
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("word error rate (%), with 95 % intervals")
    data = ", ".join(Path(part).name for part in shown[0].test_data.split())
    figure.suptitle(title + (f", {data}" if data else ""), x=0.02, ha="left")
    axes.margins(x=0.12, y=0.15)
    readable_ticks(axes.xaxis)
    rates = [rate for _, rate in points]
    if max(rates) > 2 * min(rates) > 0:  # one bad model must not press the others together
        axes.set_yscale("log")
        readable_ticks(axes.yaxis)
    axes.grid(True, which="both", alpha=0.25)
    figure.legend(loc="outside lower right", ncols=3, frameon=False)
    _label(axes, [r.name for r in shown], points)
    figure.savefig(path, dpi=figure.dpi)  # the labels were placed in pixels
    pyplot.close(figure)
    return True


def readable_ticks(axis: Any) -> None:
    """Plain numbers on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _label(axes: Any, names: Sequence[str], points: Sequence[tuple[float, float]]) -> None:
    """Names beside the points, moved away (with a line) where they would cover something.

    A name with two points next to each other is written once, one without room not at all.
    """
    from matplotlib.text import Text

    axes.figure.canvas.draw()  # before it, no text has a size
    renderer = axes.figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer).extents
    pixels = [tuple(axes.transData.transform(point)) for point in points]
    taken: list[Box] = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in pixels]
    written: list[tuple[str, tuple[float, ...]]] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if any(names[i] == name and math.dist(pixels[i], p) < NEAR for name, p in written):
            continue
        for far, offset, alignment in _places():
            text = axes.annotate(
                names[i], points[i], xytext=offset, textcoords="offset points", fontsize=8,
                ha=alignment, va="center",
                arrowprops={"arrowstyle": "-", "color": "0.7", "lw": 0.6} if far else None,
            )  # fmt: skip
            text.update_positions(renderer)
            left, bottom, right, top = Text.get_window_extent(text, renderer).extents  # no line
            bounds = (left, bottom, right, top)
            if _inside(bounds, frame) and not any(_overlap(bounds, other) for other in taken):
                taken.append(bounds)
                written.append((names[i], pixels[i]))
                break
            text.remove()


def _places() -> Iterator[tuple[bool, tuple[float, float], str]]:
    """Where a label may stand, best first: whether it needs a line, offset in points, alignment."""
    for distance in range(0, 90, 12):
        for x, y in ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0)):
            alignment = "left" if x > 0 else "right"
            yield distance > 0, (x * (5 + distance / 2), y * (9 + distance)), alignment


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes (left, bottom, right, top) have a point in common."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _inside(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] > b[0] and a[1] > b[1] and a[2] < b[2] and a[3] < b[3]
