"""Results side by side: one row a technique, and what a smaller or faster model costs.

A file of `results` is compared with the baseline's file of its own kind: bytes and latency of a
`.pt` with those of the baseline's `.pt`, of an `.onnx` with its `.onnx`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asr.measure.results import (
    REFERENCE_FORMS,
    Reference,
    Result,
    Speed,
    by_technique,
    by_test_data,
    find_baseline,
)
from asr.measure.scores import compare

MISSING = "–"
END = "<!-- end -->"

NOTES = """\
- *smaller*, *faster*: how many times, against the first row's file of the same kind.
- *ΔWER*: relative change of the `.pt`'s word error rate against the first row's; *difference*: 95 %
  interval of that change in percentage points, paired by utterance. Both are the `.onnx`'s, against
  the first row's `.onnx`, where a row has no `.pt`.
- *ms*: median time from waveform to text, one utterance at a time, one thread; *memory*: the
  highest of the process. Both are the `.onnx`'s, or where it says so the `.pt`'s.
- *texts alike*: utterances of which the `.onnx` and the `.pt` write the same text, or where a row
  has no `.pt` the `.onnx` and the first row's."""

Files = Mapping[str, Result]  # the results of one technique by kind


def markdown(
    results: Sequence[Result], baseline: str = "", reference: Reference | None = None,
    speed: Speed | None = None,
) -> str:  # fmt: skip
    """One table for each test set, what its columns mean, and how it was measured."""
    parts: list[str] = []
    if speed:
        results = [speed.of(result) for result in results]
    for data, group in by_test_data(results).items():
        first = find_baseline(group, baseline)
        parts += [f"Test data: `{data}`" if data else "", table(group, first, reference)]
        parts.append(set_table(group))
    notes = [NOTES]
    if speed:
        notes.append(
            f"- Times and memory: `{speed.command}` (commit {speed.commit}), 10 s of audio."
        )
    if reference:
        notes.append(f"- *design*: {reference.source}; all its figures stand below.")
    parts.append("\n".join([*notes, *machines(results)]))
    parts += [reference_table(reference)] if reference else []
    parts.append(commands(results))
    return "\n\n".join(part for part in parts if part) + "\n"


def by_set(results: Sequence[Result]) -> str:
    """Only the error rates of each test set, in the order of the results, and the commands."""
    text = set_table(results)
    if not text:
        raise ValueError("no result has several test sets: give evaluate.py several --test_data")
    return "\n\n".join([text, "\n".join(machines(results)), commands(results)]) + "\n"


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
    mine, theirs = (pt, float_pt) if pt else (onnx, base.get("onnx"))
    timed = next((r for r in (onnx, pt) if r and not math.isnan(r.latency)), None)
    mark = " (.pt)" if timed and timed is pt else ""
    known = reference.rows.get(name, {}) if reference else {}

    def design(header: str, key: str) -> list[tuple[str, str]]:
        text = number(known.get(key, math.nan), REFERENCE_FORMS[key])
        return [(f"design: {header}", text)] if reference else []

    delta = math.nan if files is base else ratio(mine, theirs, "wer") - 1
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
        ("difference", MISSING if files is base else difference(mine, theirs)),
        ("ms", number(1e3 * value(timed, "latency"), "{:.1f}") + mark),
        ("faster", number(ratio(timed and base.get(timed.kind), timed, "latency"), "{:.2f}")),
        *design("faster", "faster"),
        ("memory MB", number(value(timed, "peak_rss") / 1e6, "{:.0f}")),
        ("texts alike", number(alike(onnx, pt or theirs), "{:.1%}")),
    ]


def set_table(results: Sequence[Result]) -> str:
    """One row a technique, the rates of its `.pt` (else its `.onnx`) on each set; '' without sets.

    A set is named by the last part of its path.
    """
    rows: list[list[str]] = []
    for name, files in by_technique([r for r in results if r.sets]).items():
        row = [name]
        for part in (files.get("pt") or files["onnx"]).sets:
            low, high = part["wer_interval"]
            row.append(
                f"{number(part['wer'], '{:.1%}')} ({100 * low:.1f} to {100 * high:.1f}), "
                f"{number(part['cer'], '{:.1%}')}"
            )
        rows.append(row)
    if not rows:
        return ""
    sets = next(r.sets for r in results if r.sets)
    titles = [f"{Path(s['test_data']).name}, {s['words']:,} words: WER (95 %), CER" for s in sets]
    lines = [["technique", *titles], ["---"] + ["--:"] * len(sets), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def reference_table(reference: Reference) -> str:
    """The other study's own figures, as it prints them."""
    titles = ["MB", "smaller", "WER", "ΔWER", "seconds", "faster"]
    lines = [["technique", *titles], ["---"] + ["--:"] * len(titles)]
    for name, row in reference.rows.items():
        cells = [number(row.get(key, math.nan), form) for key, form in REFERENCE_FORMS.items()]
        lines.append([name, *cells])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = "\n".join(f"- {note}" for note in reference.notes)
    return "\n\n".join(part for part in (f"From {reference.source}:", table, notes) if part)


def value(result: Result | None, key: str) -> float:
    return float(getattr(result, key)) if result else math.nan


def ratio(above: Result | None, below: Result | None, key: str) -> float:
    return value(above, key) / (value(below, key) or math.nan)


def number(figure: float, form: str) -> str:
    """The figure, with a space before a percent sign."""
    return MISSING if math.isnan(figure) else form.format(figure).replace("%", " %")


def difference(result: Result | None, other: Result | None) -> str:
    """The 95 % interval in points of how far the first's WER is above the other's."""
    rates = comparison(result, other).get("wer")
    if not rates:
        return MISSING
    low, high = rates["interval"]
    return f"{100 * low:+.2f} to {100 * high:+.2f}"


def alike(result: Result | None, other: Result | None) -> float:
    """The share of utterances with the same text."""
    return float(comparison(result, other).get("identical", math.nan))


def comparison(result: Result | None, other: Result | None) -> dict[str, Any]:
    """What evaluate.py --compare wrote of the two, or would have by what they hold; else empty."""
    if not result or not other or result is other:
        return {}
    if compared(result, other):
        return result.comparison
    if not (result.utterances and other.utterances):
        return {}
    try:
        return compare({"utterances": result.utterances}, {"utterances": other.utterances})
    except (ValueError, KeyError):  # other utterances, or without their counts
        return {}


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
        parts += [" ".join(machine.get("flags", []))] if machine.get("flags") else []
        parts += [f"{k} {machine[k]}" for k in ("torch", "onnxruntime") if machine.get(k)]
        known = loads.setdefault(", ".join(parts), [])
        known += [machine["load_before"]] if "load_before" in machine else []
    return [
        f"- Measured on: {line}"
        + (f"; load before it {min(known):.1f} to {max(known):.1f}." if known else ".")
        for line, known in loads.items()
    ]


def commands(results: Sequence[Result]) -> str:
    """One line a technique, folded; of those made from the first, how that was made is not said."""
    lines: list[str] = []
    first, past = "", list[str]()  # the first technique and its steps
    for name in dict.fromkeys(r.name for r in results):
        mine = [r for r in results if r.name == name and r.about.get("command")]
        mine.sort(key=lambda r: r.kind, reverse=True)  # the .pt's, then the .onnx's
        commits, seeds = (
            " and ".join(dict.fromkeys(str(r.about.get(key, MISSING)) for r in mine))
            for key in ("commit", "seed")
        )
        made = ", ".join(f"`{r.about['command']}`" for r in mine)
        steps = list(
            dict.fromkeys(describe_step(e) for r in mine for e in r.about.get("made_by", ()))
        )
        by = "; made by " + ", then ".join(steps) if steps else ""
        if past and steps[: len(past)] == past:
            steps = steps[len(past) :]
            by = f"; made from {first}" + (" by " + ", then ".join(steps) if steps else "")
        elif not past:
            first, past = name, steps
        lines += [f"- {name} (commit {commits}, seed {seeds}): {made}{by}"] if mine else []
    if not lines:
        return ""
    return "\n".join(["<details><summary>Commands</summary>", "", *lines, "", "</details>"])


def describe_step(entry: dict[str, Any]) -> str:
    """A step of a model's history: its method and what it was told."""
    told = {k: v for k, v in entry.get("config", {}).items() if v not in ("", "*", 0, None)}
    if entry["step"] == "train":
        told = {k: told[k] for k in ("epochs", "learning_rate", "seed") if k in told}
    options = ", ".join(f"{key} {value}" for key, value in told.items())
    commit = f", commit {entry['commit']}" if entry.get("commit") else ""
    digest = f" from {entry['sha256'][:12]}" if entry.get("sha256") else ""
    return entry["step"] + digest + (f" ({options}{commit})" if options or commit else "")


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
