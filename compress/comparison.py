"""Every method on one model: which rows there are, and how each is made, exported and measured.

Each row is a folder with `model.pt` and `model.onnx`, and beside the folders two result files of
each in evaluate.py's form, ROW_pt.json and ROW_onnx.json: what is there is not made again. Latency
and memory of all are measured side by side at the end, in the form of scripts/benchmark.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asr.common.provenance import portable_path
from asr.measure.benchmark import speed_of_noise
from asr.measure.evaluation import evaluate_data, without_texts
from asr.measure.machine import provenance
from asr.network.export import export_onnx
from asr.runtime.files import write_json
from compress.core import UnchangedError
from compress.run import compress

FLOAT = "float"
ABOUT = "about.json"  # of the folder: which model and data its rows are of
MODELS = ("model.pt", "model.onnx")
SPEED = "speed.json"


@dataclass(frozen=True)
class Row:
    """A setting of a method, by default of the float model.

    `epochs`: how many times the fine-tuning that is asked for it takes; `speech` and `tuning`:
    options that go with calibration speech and with fine-tuning.
    """

    method: str
    options: dict[str, Any]
    of: str = FLOAT
    epochs: int = 0
    speech: dict[str, Any] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)


def _rate(rate: float) -> dict[str, Any]:
    return {"fine_tune_learning_rate": rate}


INT8, INT4 = {"precision": "int8"}, {"precision": "int4"}
RATIO = {"size_ratio": 2.2}
STRUCTURED = {"pruning_type": "structured", "sparsity": 0.3}
HALF, SIXTEEN = {"sparsity": 0.5}, {"num_clusters": 16, "codebooks": 16}
AWARE, TAYLOR = {"activation_aware": True}, {"importance": "taylor"}
HINTS = _rate(6e-4) | {"hint_weight": 10.0}
SLOWLY = _rate(1e-4) | {"hint_weight": 10.0}
ROWS = {
    "fp16": Row("quantization", {"precision": "fp16"}),
    "int8": Row("quantization", INT8),
    "int4": Row("quantization", INT4),
    "int4_qat": Row("quantization", INT4, epochs=1),
    "int2_qat": Row("quantization", {"precision": "int2"}, epochs=4, tuning=_rate(3e-4)),
    "ternary_qat": Row("quantization", {"precision": "ternary"}, epochs=4, tuning=_rate(3e-4)),
    "clustering_256": Row("clustering", {"num_clusters": 256}),
    "clustering_16": Row("clustering", SIXTEEN, epochs=1, speech=AWARE),
    "unstructured_30": Row("pruning", {"sparsity": 0.3}, speech=TAYLOR),
    "unstructured_50": Row("pruning", HALF, epochs=1, speech=TAYLOR, tuning=SLOWLY),
    "pruned_50_int8": Row("quantization", INT8, of="unstructured_50"),
    "structured_30": Row("pruning", STRUCTURED, epochs=4, speech=TAYLOR, tuning=HINTS),
    "structured_30_int8": Row("quantization", INT8, of="structured_30"),
    "low_rank": Row("factorization", RATIO, epochs=4, speech=AWARE, tuning=HINTS),
    "low_rank_int8": Row("quantization", INT8, of="low_rank"),
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """One model's rows: where they go, the speech to measure on, and how to train."""

    model_path: Path
    test_data: Sequence[str]
    folder: Path
    calibration_data: str = ""
    calibrate: bool = True  # the options that look at speech are used
    epochs: int = 0  # of fine-tuning, in the rows that profit from it; ternary takes four times it
    fine_tune_data: str = ""
    texts: bool = True  # the results hold the texts, not their counts alone

    def begin(self) -> None:
        """Notes in the folder what its rows are of; ValueError where they are of something else."""
        about = {
            "model": portable_path(str(self.model_path)),
            "sha256": hashlib.sha256(self.model_path.read_bytes()).hexdigest(),
            "test_data": [portable_path(path) for path in self.test_data],
            "epochs": self.epochs,
            "fine_tune_data": portable_path(self.fine_tune_data),
            "calibrated": self.calibrate,
        }
        path = self.folder / ABOUT
        if not path.exists():
            write_json(path, about)
            return
        earlier = json.loads(path.read_text(encoding="utf-8"))
        for key, value in about.items():
            if earlier.get(key) != value:
                raise ValueError(
                    f"{path}: the rows there are of {key} {earlier.get(key)!r}, not {value!r}; "
                    "give another --output_dir"
                )

    def results(self, name: str) -> list[Path]:
        """The result files of a row, .pt first."""
        return [self.folder / f"{name}_{kind}.json" for kind in ("pt", "onnx")]

    def model(self, name: str) -> Path:
        """A row's checkpoint."""
        return self.model_path if name == FLOAT else self.folder / name / MODELS[0]

    def exported(self, name: str) -> Path:
        """A row's .onnx."""
        return self.folder / name / MODELS[1]

    def is_made(self, name: str) -> bool:
        """Whether a row has its files and both results."""
        files = [self.model(name), self.exported(name), *self.results(name)]
        return all(path.exists() for path in files)

    def make(self, name: str, command: str) -> str:
        """Makes what a row lacks; why the method does not suit the model, or ""."""
        model, exported = self.model(name), self.exported(name)
        if not model.exists():
            why = self.compress(name)
            if why:
                return why
        if not exported.exists():
            export_onnx(model, exported)
        for path, measured in zip(self.results(name), (model, exported), strict=True):
            if not path.exists():
                self.measure(path, measured, command)
        return ""

    def compress(self, name: str) -> str:
        """Writes a row's checkpoint, and first that of the row it begins from; as `make` else."""
        row = ROWS[name]
        if row.of != FLOAT and not self.model(row.of).exists():
            why = self.compress(row.of)
            if why:
                return why
        options = row.options | (row.speech if self.calibrate else {})
        if self.epochs and row.epochs:
            options |= row.tuning | {"fine_tune_epochs": self.epochs * row.epochs}
            options |= {"fine_tune_data": self.fine_tune_data} if self.fine_tune_data else {}
        speech = self.calibration_data if self.calibrate and row.speech else ""
        try:
            compress(
                self.model(row.of), self.folder / name, method=row.method,
                calibration_data=speech, **options,
            )  # fmt: skip
        except UnchangedError as error:
            return str(error)
        return ""

    def measure(self, path: Path, model: Path, command: str) -> None:
        """Writes the result of a model to `path`.

        A .pt is compared with the float one, an .onnx with its .pt, whose texts it should write.
        """
        first, own = self.results(FLOAT)[0], path.with_name(path.name.replace("_onnx.", "_pt."))
        other = own if own != path else first
        result = evaluate_data(
            model, list(self.test_data), speed=False, other=other if other != path else None
        )
        if not self.texts:
            result = without_texts(result)
        utterances = result.pop("utterances")
        write_json(path, result | {"command": command, "utterances": utterances})

    def time(self, names: Sequence[str], command: str) -> Path:
        """The file with latency and memory of these rows' .onnx, measured again for a new row."""
        target = self.folder / SPEED
        paths = [self.exported(name) for name in names]
        if target.exists():
            timed = {row["model"] for row in json.loads(target.read_text("utf-8"))["results"]}
            if timed >= {portable_path(str(path)) for path in paths}:
                return target
        about = provenance(command)
        rows = speed_of_noise(paths)
        results = [row | {"model": portable_path(str(row["model"]))} for row in rows]
        write_json(target, {"results": results, **about})
        return target


def chosen(names: Sequence[str], tuned: bool) -> list[str]:
    """The rows that are asked for, or all that can be made; ValueError for one that cannot be."""
    for name in names:
        if name not in ROWS:
            raise ValueError(f"no row is named {name}; there are {', '.join(ROWS)}")
        if name.endswith("_qat") and not tuned:
            raise ValueError(f"{name} is trained as it is stored: give --fine_tune_epochs as well")
    without = [name for name in ROWS if tuned or not name.endswith("_qat")]
    return list(names) or without
