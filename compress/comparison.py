"""Every method on one model: which rows there are, and how each is made, exported and measured.

Each row is a folder with `model.pt` and `model.onnx`, and beside the folders two result files of
each in evaluate.py's form, ROW_pt.json and ROW_onnx.json: what is there is not made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asr.common.provenance import portable_path
from asr.measure.evaluation import evaluate_data
from asr.network.export import export_onnx
from asr.runtime.files import write_json
from compress.core import UnchangedError
from compress.run import compress

FLOAT = "float"
ABOUT = "about.json"  # of the folder: which model and data its rows are of
MODELS = ("model.pt", "model.onnx")


@dataclass(frozen=True)
class Row:
    """A setting of a method, by default of the float model."""

    method: str
    options: dict[str, Any]
    of: str = FLOAT
    trains: bool = False  # needs fine-tuning, or is much better with it
    speech: dict[str, Any] = field(default_factory=dict)  # options that calibration speech allows


def _quantized(precision: str, of: str = FLOAT, trains: bool = False) -> Row:
    return Row("quantization", {"precision": precision}, of, trains)


def _pruned(sparsity: float, kind: str, trains: bool = False) -> Row:
    options = {"sparsity": sparsity, "pruning_type": kind}
    return Row("pruning", options, trains=trains, speech={"importance": "taylor"})


AWARE = {"activation_aware": True}
ROWS = {
    "fp16": _quantized("fp16"),
    "int8": _quantized("int8"),
    "int4": _quantized("int4"),
    "int4_qat": _quantized("int4", trains=True),
    "int2_qat": _quantized("int2", trains=True),
    "ternary_qat": _quantized("ternary", trains=True),
    "clustering_256": Row("clustering", {"num_clusters": 256}),
    "clustering_16": Row("clustering", {"num_clusters": 16, "codebooks": 16}, speech=AWARE),
    "unstructured_30": _pruned(0.3, "unstructured"),
    "unstructured_50": _pruned(0.5, "unstructured", trains=True),
    "pruned_50_int8": _quantized("int8", of="unstructured_50"),
    "structured_30": _pruned(0.3, "structured", trains=True),
    "structured_30_int8": _quantized("int8", of="structured_30"),
    "low_rank": Row("factorization", {"size_ratio": 2.2}, trains=True, speech=AWARE),
    "low_rank_int8": _quantized("int8", of="low_rank"),
}


@dataclass(frozen=True)
class Comparison:
    """One model's rows: where they go, the speech to measure on, and how to train."""

    model_path: Path
    test_data: Sequence[str]
    folder: Path
    calibration_data: str = ""
    calibrate: bool = True  # the options that look at speech are used
    tuning: dict[str, Any] = field(default_factory=dict)  # fine_tune_epochs and the like; or none

    def begin(self) -> None:
        """Notes in the folder what its rows are of; ValueError where they are of something else."""
        about = {
            "model": portable_path(str(self.model_path)),
            "sha256": hashlib.sha256(self.model_path.read_bytes()).hexdigest(),
            "test_data": [portable_path(path) for path in self.test_data],
            "tuning": self.tuning,
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
        options |= self.tuning if row.trains else {}
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
        """Writes the result of a model to `path`, compared with the float one's where there is."""
        first = self.results(FLOAT)[0]
        other = first if first.exists() and first != path else None
        result = evaluate_data(model, list(self.test_data), other=other)
        utterances = result.pop("utterances")
        write_json(path, result | {"command": command, "utterances": utterances})


def chosen(names: Sequence[str], tuned: bool) -> list[str]:
    """The rows that are asked for, or all that can be made; ValueError for one that cannot be."""
    for name in names:
        if name not in ROWS:
            raise ValueError(f"no row is named {name}; there are {', '.join(ROWS)}")
        if ROWS[name].trains and name.endswith("_qat") and not tuned:
            raise ValueError(f"{name} is trained as it is stored: give --fine_tune_epochs as well")
    without = [name for name in ROWS if tuned or not name.endswith("_qat")]
    return list(names) or without
