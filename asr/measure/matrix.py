"""Teachers against students: how accurate, small, fast and how like its teacher each student is.

What is best for a use follows from the numbers by the rules of `USES`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asr.common.metrics import error_rates
from asr.corpus.manifest import Utterance
from asr.measure.agreement import frame_agreement, text_agreement
from asr.runtime.audio import read_audio
from asr.runtime.recognizer import load

TOLERANCE = 1.10  # a use may cost this much of the least WER


@dataclass(frozen=True)
class Entry:
    """A model to compare: its .pt, its .onnx that is timed and counted, and perhaps an int8 one."""

    name: str
    model: str
    onnx: str
    int8: str = ""


@dataclass(frozen=True)
class Plan:
    """Teachers by name, each with its students."""

    teachers: list[Entry]
    pairs: list[tuple[str, Entry]]  # name of the teacher, student


def read_plan(path: str | Path) -> Plan:
    """A JSON file; paths are relative to it. Raises ValueError.

    {"teachers": {"large": {"model": "a.pt", "onnx": "a.onnx"}},
     "students": [{"name": "half", "teacher": "large", "model": …, "onnx": …, "int8": …}]}
    """
    folder = Path(path).resolve().parent
    try:
        contents = json.loads(Path(path).read_text(encoding="utf-8"))
        teachers = [_entry(name, values, folder) for name, values in contents["teachers"].items()]
        names = {entry.name for entry in teachers}
        pairs = []
        for values in contents["students"]:
            if values["teacher"] not in names:
                raise ValueError(
                    f"student {values['name']} names no teacher of the file: {values['teacher']}"
                )
            pairs.append((values["teacher"], _entry(values["name"], values, folder)))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: teachers and students expected, {error} is missing") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    if not pairs:
        raise ValueError(f"{path}: no students to compare")
    return Plan(teachers, pairs)


def _entry(name: str, values: dict[str, str], folder: Path) -> Entry:
    paths = {key: str(folder / values[key]) for key in ("model", "onnx", "int8") if key in values}
    for where in paths.values():
        if not Path(where).exists():
            raise ValueError(f"{where}: no such model ({name})")
    return Entry(name, paths["model"], paths["onnx"], paths.get("int8", ""))


@dataclass(frozen=True)
class Answers:
    """What a model says of test data: best tokens of frames, texts, rates."""

    tokens: list[npt.NDArray[np.int64]]
    texts: list[str]
    rates: dict[str, Any]
    parameters: int


def listen(path: str, utterances: Sequence[Utterance]) -> Answers:
    """The answers of a model file, one utterance at a time."""
    recognizer = load(path)
    tokens, texts = [], []
    for utterance in utterances:
        waveform = read_audio(utterance.audio_filepath, recognizer.info.features.sample_rate)
        log_probs = recognizer.waveform_log_probs(waveform)
        tokens.append(log_probs.argmax(axis=1))
        texts.append(recognizer.decode(log_probs))
    rates = error_rates([u.text for u in utterances], texts)
    return Answers(tokens, texts, rates, recognizer.info.parameters)


@dataclass(frozen=True)
class Row:
    """A student beside its teacher. Sizes in bytes, latency in seconds."""

    teacher: str
    student: str
    wer: float
    cer: float
    parameters: int
    pt_bytes: int
    int8_bytes: int  # 0 without one
    latency: float
    speedup: float  # of its .onnx over the teacher's
    int8_speedup: float  # of the int8 file over the teacher's .onnx; NaN without one
    flops_per_second: float  # of audio
    frames: float  # agreement
    non_blank: float
    words: float
    utterances: float


def compare(
    teacher: str, student: Entry, said: Answers, example: Answers, times: dict[str, float],
    example_latency: float, flops: float,
) -> Row:  # fmt: skip
    """The row of a student; `times` are latencies by path."""
    agreement = frame_agreement(said.tokens, example.tokens)
    agreement |= text_agreement(said.texts, example.texts)
    return Row(
        teacher, student.name, said.rates["wer"], said.rates["cer"], said.parameters,
        Path(student.model).stat().st_size,
        Path(student.int8).stat().st_size if student.int8 else 0,
        times[student.onnx], example_latency / times[student.onnx],
        example_latency / times[student.int8] if student.int8 else math.nan,
        flops, **agreement,
    )  # fmt: skip


def file_size(row: Row) -> int:
    """Bytes of what would ship: the int8 file if there is one."""
    return row.int8_bytes or row.pt_bytes


def fastest_of(row: Row) -> float:
    """The larger speed-up of the two files."""
    return max(row.speedup, 0 if math.isnan(row.int8_speedup) else row.int8_speedup)


USES: dict[str, tuple[str, Callable[[list[Row]], Row]]] = {
    "fastest": ("the largest speed-up", lambda rows: max(rows, key=fastest_of)),
    "smallest": ("the smallest file", lambda rows: min(rows, key=file_size)),
    "most accurate": ("the lowest WER", lambda rows: min(rows, key=lambda r: r.wer)),
    "server": (
        f"the largest speed-up of those with a WER of at most {TOLERANCE:g} times the lowest",
        lambda rows: max(accurate(rows), key=fastest_of),
    ),
    "device": (
        f"the smallest file of those with a WER of at most {TOLERANCE:g} times the lowest",
        lambda rows: min(accurate(rows), key=file_size),
    ),
}


def accurate(rows: list[Row]) -> list[Row]:
    """Those near the lowest WER."""
    least = min(row.wer for row in rows)
    return [row for row in rows if row.wer <= TOLERANCE * least]


def choices(rows: list[Row]) -> dict[str, str]:
    """For each use, `student of teacher`."""
    chosen = {use: pick(rows) for use, (_, pick) in USES.items()}
    return {use: f"{row.student} of {row.teacher}" for use, row in chosen.items()}


def markdown(rows: list[Row]) -> str:
    """The table, and what is best for which use with its rule."""
    head = (
        "teacher", "student", "WER", "CER", "parameters", ".pt MB", "int8 MB", "ms", "faster",
        "int8 faster", "GFLOPs/s", "same frames", "without blank", "words", "utterances",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " --: |" * (len(head) - 2)]
    for r in rows:
        int8 = (
            (f"{r.int8_bytes / 1e6:.2f}", f"{r.int8_speedup:.2f}") if r.int8_bytes else ("–", "–")
        )
        cells = (
            r.teacher, r.student, f"{r.wer:.2%}", f"{r.cer:.2%}", f"{r.parameters / 1e6:.2f} M",
            f"{r.pt_bytes / 1e6:.2f}", int8[0],
            f"{1e3 * r.latency:.1f}", f"{r.speedup:.2f}", int8[1],
            f"{r.flops_per_second / 1e9:.3f}", f"{r.frames:.1%}", f"{r.non_blank:.1%}",
            f"{r.words:.1%}", f"{r.utterances:.1%}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| use | student | rule |", "| --- | --- | --- |"]
    lines += [f"| {use} | {who} | {USES[use][0]} |" for use, who in choices(rows).items()]
    return "\n".join(lines) + "\n"


def as_json(rows: list[Row]) -> dict[str, Any]:
    """Rows and choices, JSON types; NaN becomes null."""
    result = {"rows": [asdict(row) for row in rows], "uses": choices(rows),
              "rules": {use: rule for use, (rule, _) in USES.items()}}  # fmt: skip
    found: dict[str, Any] = json.loads(json.dumps(result), parse_constant=lambda _: None)
    return found


def heat_map(rows: list[Row], path: Path) -> None:
    """A row a pair, a column a figure, coloured from the worst to the best of each column."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns: list[tuple[str, Callable[[Row], float], str, bool]] = [
        ("WER", lambda r: 100 * r.wer, "{:.1f} %", False),
        ("parameters", lambda r: r.parameters / 1e6, "{:.2f} M", False),
        ("file", lambda r: file_size(r) / 1e6, "{:.2f} MB", False),
        ("speed-up", fastest_of, "{:.2f}x", True),
        ("GFLOPs/s", lambda r: r.flops_per_second / 1e9, "{:.2f}", False),
        ("frames", lambda r: 100 * r.frames, "{:.1f} %", True),
        ("non-blank", lambda r: 100 * r.non_blank, "{:.1f} %", True),
        ("words", lambda r: 100 * r.words, "{:.1f} %", True),
        ("utterances", lambda r: 100 * r.utterances, "{:.1f} %", True),
    ]
    values = np.array([[value(row) for _, value, _, _ in columns] for row in rows])
    low, high = values.min(axis=0), values.max(axis=0)
    share = (values - low) / np.where(high > low, high - low, 1)
    good = np.where([more for *_, more in columns], share, 1 - share)
    good[:, high == low] = 0.5
    figure, axes = pyplot.subplots(
        figsize=(11, 1.5 + 0.45 * len(rows)), dpi=130, layout="constrained"
    )
    axes.imshow(good, cmap="RdYlGn", vmin=-0.3, vmax=1.3, aspect="auto")
    axes.set_xticks(range(len(columns)), [name for name, *_ in columns])
    axes.set_yticks(range(len(rows)), [f"{r.student} of {r.teacher}" for r in rows])
    for i in range(len(rows)):
        for j, (_, _, form, _) in enumerate(columns):
            axes.text(j, i, form.format(values[i, j]), ha="center", va="center", fontsize=8)
    figure.savefig(path, dpi=figure.dpi)
    pyplot.close(figure)
