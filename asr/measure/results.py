"""Result files of evaluate.py as the report reads them, and other studies' figures beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

PLAIN_STEMS = ("result", "evaluation", "results")  # of files that are named by their folder
ABOUT = ("command", "commit", "seed", "machine", "made_by")
REFERENCE_FORMS = {
    "mb": "{:.2f}", "smaller": "{:.2f}", "wer": "{:.2%}", "delta_wer": "{:+.2%}",
    "seconds": "{:.4f}", "faster": "{:.2f}",
}  # fmt: skip


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
    model: str = ""
    comparison: dict[str, Any] = field(default_factory=dict)  # with the result it names `other`
    wer_interval: tuple[float, float] | None = None  # 95 %
    utterances: list[dict[str, Any]] = field(default_factory=list)  # counts and texts, or digests
    sets: list[dict[str, Any]] = field(default_factory=list)  # the rates of each test set
    about: dict[str, Any] = field(default_factory=dict)  # the keys of ABOUT


@dataclass(frozen=True)
class Reference:
    """Another study's figures by technique: keys of REFERENCE_FORMS, ratios and fractions."""

    source: str
    rows: dict[str, dict[str, float]]
    notes: tuple[str, ...] = ()


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
        model=str(contents.get("model", "")),
        comparison=contents.get("comparison") or {},
        wer_interval=tuple(contents["wer_interval"]) if contents.get("wer_interval") else None,
        utterances=contents.get("utterances") or [],
        sets=contents.get("sets") or [],
        about={k: contents[k] for k in ABOUT if k in contents},
    )


@dataclass(frozen=True)
class Speed:
    """What `scripts/benchmark.py infer` measured: models side by side, on one thread."""

    rows: dict[str, dict[str, float]]  # latency in seconds and peak_rss in bytes by model path
    command: str
    commit: str

    def of(self, result: Result) -> Result:
        """The result with these times in place of its own, which other work may have disturbed."""
        row = self.rows.get(result.model, {})
        nan = math.nan
        return replace(result, latency=row.get("latency", nan), peak_rss=row.get("peak_rss", nan))


def read_speed(path: str | Path) -> Speed:
    """Raises ValueError for a file that `scripts/benchmark.py infer` has not written."""
    try:
        contents = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = {row["model"]: row for row in contents["results"] if row["threads"] == 1}
        return Speed(rows, str(contents["command"]), str(contents["commit"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no times of scripts/benchmark.py infer with --output_path ({error})"
        ) from None


def read_reference(path: str | Path) -> Reference:
    """Raises ValueError for a file that is not like experiments/design.json."""
    like = "; it needs a source and rows like those of experiments/design.json"
    try:
        contents = json.loads(Path(path).read_text(encoding="utf-8"))
        reference = Reference(
            str(contents["source"]), dict(contents["rows"]), tuple(contents.get("notes", ()))
        )
        for name, row in reference.rows.items():
            for key, value in row.items():
                if key not in REFERENCE_FORMS or not isinstance(value, int | float):
                    raise ValueError(f"{name}: {key} = {value!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not reference figures ({error}){like}") from None
    return reference


def find_baseline(results: Sequence[Result], name: str = "") -> str:
    """The name of the technique the others are compared with.

    Without a name: the largest with `baseline` or `float` in its name, those words alone first, or
    the only one there is. Raises ValueError where none is known.
    """
    known = list(dict.fromkeys(r.name for r in results))
    if name and name not in known:
        raise ValueError(f"no result is named {name!r}; there are {', '.join(known)}")
    words = ("baseline", "float")
    named = [r for r in results if any(word in r.name.lower() for word in words)]
    if not name and not named and len(known) > 1:
        raise ValueError(
            "which of the results is the float model, that the others are compared with? Name it "
            f"with --baseline: {', '.join(known)}"
        )
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
