"""Results side by side: one row a technique, and what a smaller or faster model costs.

Reads the JSON files of evaluate.py. A file is compared with the baseline's file of its own kind:
bytes and latency of a `.pt` with those of the baseline's `.pt`, of an `.onnx` with its `.onnx`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PLAIN_STEMS = ("result", "evaluation", "results")  # of files that are named by their folder
MISSING = "–"
END = "<!-- end -->"
REFERENCE_FORMS = {"smaller": "{:.2f}", "delta_wer": "{:+.2%}", "faster": "{:.2f}"}

NOTES = """\
- *smaller*, *faster*: how many times, against the first row's file of the same kind.
- *ΔWER*: relative change of the `.pt`'s word error rate against the first row's; *difference*: 95 %
  interval of that change in percentage points, paired by utterance.
- *ms*: median time from waveform to text, one utterance at a time, one thread; *memory*: the
  highest of the process. Both are the `.onnx`'s, or where it says so the `.pt`'s.
- *texts alike*: utterances of which the `.onnx` and the `.pt` write the same text."""


@dataclass(frozen=True)
class Result:
    """What the report needs of a result file; NaN where it was not measured."""

    name: str  # of the technique
    kind: str  # "pt" or "onnx"
    wer: float
    bytes: int
    path: Path
    latency: float = math.nan  # seconds, median, one thread
    peak_rss: float = math.nan  # bytes
    test_data: str = ""
    comparison: dict[str, Any] = field(default_factory=dict)  # with the result it names `other`
    about: dict[str, Any] = field(default_factory=dict)  # command, commit, seed, machine


@dataclass(frozen=True)
class Reference:
    """Another study's figures by technique: keys of REFERENCE_FORMS, ratios and fractions."""

    source: str
    rows: dict[str, dict[str, float]]

    def find(self, name: str) -> dict[str, float]:
        """The row of this name, else the longest that begins it: clustering for clustering_16."""
        found = [key for key in self.rows if f"{name}_".startswith(f"{key}_")]
        return self.rows[max(found, key=len)] if found else {}


Files = Mapping[str, Result]  # the results of one technique by kind


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
    """One result file; named by its key `name`, by its file, or if that says nothing its folder.

    The file's name may end in its kind: `int8_pt.json` and `int8_onnx.json` are both of int8.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file; evaluate.py writes results")
    if not is_result(path):
        raise ValueError(f"{path}: not a result of evaluate.py (no wer and bytes in it)")
    contents = json.loads(path.read_text(encoding="utf-8"))
    kind = "onnx" if str(contents.get("model", "")).endswith(".onnx") else "pt"
    stem = path.stem.removesuffix(f"_{kind}")
    name = path.resolve().parent.name if stem in PLAIN_STEMS else stem
    return Result(
        name=str(contents.get("name") or name),
        kind=kind,
        wer=float(contents["wer"]),
        bytes=int(contents["bytes"]),
        path=path,
        latency=float(contents.get("latency_p50", math.nan)),
        peak_rss=float(contents.get("peak_rss", math.nan)),
        test_data=str(contents.get("test_data", "")),
        comparison=contents.get("comparison") or {},
        about={k: contents[k] for k in ("command", "commit", "seed", "machine") if k in contents},
    )


def read_reference(path: str | Path) -> Reference:
    """Raises ValueError for a file that is not like experiments/design.json."""
    like = "; it needs a source and rows like those of experiments/design.json"
    try:
        contents = json.loads(Path(path).read_text(encoding="utf-8"))
        reference = Reference(str(contents["source"]), dict(contents["rows"]))
        for name, row in reference.rows.items():
            for key, value in row.items():
                if key not in REFERENCE_FORMS or not isinstance(value, int | float):
                    raise ValueError(f"{name}: {key} = {value!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not reference figures ({error}){like}") from None
    return reference


def find_baseline(results: Sequence[Result], name: str = "") -> str:
    """The name of the technique the others are compared with.

    Without a name: the largest with `baseline` or `float` in its name, those words alone first;
    else the largest. Raises ValueError.
    """
    if name and all(r.name != name for r in results):
        known = ", ".join(dict.fromkeys(r.name for r in results))
        raise ValueError(f"no result is named {name!r}; there are {known}")
    words = ("baseline", "float")
    named = [r for r in results if any(word in r.name.lower() for word in words)]
    return name or max(named or results, key=lambda r: (r.name in words, r.bytes)).name


def by_test_data(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Only what was measured on the same data can be compared."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.test_data, []).append(result)
    return groups


def by_technique(results: Sequence[Result]) -> dict[str, dict[str, Result]]:
    """Name → kind → result. Raises ValueError for two files of one name and kind."""
    techniques: dict[str, dict[str, Result]] = {}
    for r in results:
        other = techniques.setdefault(r.name, {}).setdefault(r.kind, r)
        if other is not r:
            raise ValueError(f"{other.path} and {r.path} are both the .{r.kind} of {r.name}; "
                             'leave one out, or tell them apart by a key "name"')  # fmt: skip
    return techniques


def markdown(
    results: Sequence[Result], baseline: str = "", reference: Reference | None = None
) -> str:
    """One table for each test set, what its columns mean, and how it was measured."""
    parts: list[str] = []
    for data, group in by_test_data(results).items():
        first = find_baseline(group, baseline)
        parts += [f"Test data: `{data}`" if data else "", table(group, first, reference)]
    notes = [NOTES]
    if reference:
        notes.append(f"- *design*: {reference.source}; names that begin alike share a row of it.")
    parts += ["\n".join([*notes, *machines(results)]), commands(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(results: Sequence[Result], baseline: str, reference: Reference | None = None) -> str:
    """One row a technique: the baseline first, then by the size of the `.pt`, largest first."""
    techniques = by_technique(results)

    def place(name: str) -> tuple[bool, int]:
        files = techniques[name]
        return name != baseline, -(files.get("pt") or files["onnx"]).bytes

    rows = [
        cells(name, techniques[name], techniques[baseline], reference)
        for name in sorted(techniques, key=place)
    ]
    lines = [[header for header, _ in rows[0]], ["---"] + ["--:"] * (len(rows[0]) - 1)]
    lines += [[cell for _, cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cells(
    name: str, files: Files, base: Files, reference: Reference | None = None
) -> list[tuple[str, str]]:
    """A row as pairs of header and cell."""
    pt, onnx, float_pt = files.get("pt"), files.get("onnx"), base.get("pt")
    timed = next((r for r in (onnx, pt) if r and not math.isnan(r.latency)), None)
    mark = " (.pt)" if timed and timed is pt else ""
    known = reference.find(name) if reference else {}

    def design(header: str, key: str) -> list[tuple[str, str]]:
        text = number(known.get(key, math.nan), REFERENCE_FORMS[key])
        return [(f"design: {header}", text)] if reference else []

    delta = math.nan if files is base else ratio(pt, float_pt, "wer") - 1
    return [
        ("technique", name),
        (".pt MB", number(value(pt, "bytes") / 1e6, "{:.2f}")),
        ("smaller", number(ratio(float_pt, pt, "bytes"), "{:.2f}")),
        *design("smaller", "smaller"),
        (".onnx MB", number(value(onnx, "bytes") / 1e6, "{:.2f}")),
        ("smaller", number(ratio(base.get("onnx"), onnx, "bytes"), "{:.2f}")),
        ("WER .pt", number(value(pt, "wer"), "{:.2%}")),
        ("WER .onnx", number(value(onnx, "wer"), "{:.2%}")),
        ("ΔWER", number(delta, "{:+.1%}")),
        *design("ΔWER", "delta_wer"),
        ("difference", difference(pt, float_pt)),
        ("ms", number(1e3 * value(timed, "latency"), "{:.1f}") + mark),
        ("faster", number(ratio(timed and base.get(timed.kind), timed, "latency"), "{:.2f}")),
        *design("faster", "faster"),
        ("memory MB", number(value(timed, "peak_rss") / 1e6, "{:.0f}")),
        ("texts alike", number(alike(onnx, pt), "{:.1%}")),
    ]


def value(result: Result | None, key: str) -> float:
    return float(getattr(result, key)) if result else math.nan


def ratio(above: Result | None, below: Result | None, key: str) -> float:
    return value(above, key) / (value(below, key) or math.nan)


def number(figure: float, form: str) -> str:
    """The figure, with a space before a percent sign."""
    return MISSING if math.isnan(figure) else form.format(figure).replace("%", " %")


def difference(pt: Result | None, float_pt: Result | None) -> str:
    """The 95 % interval in points, where the two files were compared."""
    if not pt or not compared(pt, float_pt):
        return MISSING
    low, high = pt.comparison["wer"]["interval"]
    return f"{100 * low:+.2f} to {100 * high:+.2f}"


def alike(onnx: Result | None, pt: Result | None) -> float:
    if not onnx or not compared(onnx, pt):
        return math.nan
    return float(onnx.comparison.get("identical", math.nan))


def compared(result: Result, other: Result | None) -> bool:
    """Whether evaluate.py compared them, by the other's file and folder: paths differ elsewhere."""
    named = [p for p in Path(result.comparison.get("other", "")).parts if p != ".."][-2:]
    if not other or not named:
        return False
    return list(other.path.resolve().parts[-len(named) :]) == named


def machines(results: Sequence[Result]) -> list[str]:
    """A line for each machine, with its load before the measurements: times depend on it."""
    loads: dict[str, list[float]] = {}
    for machine in (r.about["machine"] for r in results if r.about.get("machine")):
        cores = machine.get("cores", 0)
        parts = [str(machine.get("processor", "")), f"{cores} core{'s' * (cores != 1)}"]
        parts += [f"{k} {machine[k]}" for k in ("torch", "onnxruntime") if machine.get(k)]
        known = loads.setdefault(", ".join(parts), [])
        known += [machine["load_before"]] if "load_before" in machine else []
    return [
        f"- Measured on: {line}"
        + (f"; load before it {min(known):.1f} to {max(known):.1f}." if known else ".")
        for line, known in loads.items()
    ]


def commands(results: Sequence[Result]) -> str:
    """One line a technique, folded."""
    lines: list[str] = []
    for name in dict.fromkeys(r.name for r in results):
        mine = [r for r in results if r.name == name and r.about.get("command")]
        mine.sort(key=lambda r: r.kind, reverse=True)  # the .pt's, then the .onnx's
        commits, seeds = (
            " and ".join(dict.fromkeys(str(r.about.get(key, MISSING)) for r in mine))
            for key in ("commit", "seed")
        )
        made = ", ".join(f"`{r.about['command']}`" for r in mine)
        lines += [f"- {name} (commit {commits}, seed {seeds}): {made}"] if mine else []
    if not lines:
        return ""
    return "\n".join(["<details><summary>Commands</summary>", "", *lines, "", "</details>"])


def insert(path: str | Path, section: str, body: str) -> str:
    """The text of a file with `body` between `<!-- results: SECTION -->` and `<!-- end -->`.

    Raises ValueError where the file does not have those lines, once and in this order.
    """
    start = f"<!-- results: {section} -->"
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    stripped = [line.strip() for line in lines]
    if stripped.count(start) != 1:
        raise ValueError(f"{path}: {stripped.count(start)} lines are {start!r}, not one; write it "
                         f"and {END!r} below it where the table belongs")  # fmt: skip
    first = stripped.index(start) + 1
    below = (i for i in range(first, len(lines)) if stripped[i].startswith(("<!-- results:", END)))
    last = next(below, None)
    if last is None or stripped[last] != END:
        raise ValueError(f"{path}: no line {END!r} after {start!r}; write it below the table")
    return "\n".join([*lines[:first], "", body.strip("\n"), "", *lines[last:]])
