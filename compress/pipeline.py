"""A recipe run stage by stage: each leaves its checkpoint and figures, a killed run goes on.

    OUTPUT_DIR/pipeline.json        what is run: the model, the steps, the data
    OUTPUT_DIR/0_source             figures of the model given
    OUTPUT_DIR/1_distillation, …    model.pt; stage.json, written last, says that it is finished
    OUTPUT_DIR/final_report.*       one row a stage

Before anything is trained, all steps are rehearsed on a copy without training, so that an order
that cannot work is refused then.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from asr.common.provenance import commit, portable_path
from asr.measure.benchmark import speed_of_noise
from asr.measure.evaluation import evaluate, read_test_data
from asr.measure.final_report import FIGURES, SPEED
from asr.measure.flops import flops_per_second
from asr.measure.machine import describe_machine
from asr.network.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from asr.network.export import to_onnx
from asr.runtime.files import write_json
from compress import core, finetuning

PLAN, DONE = "pipeline.json", "stage.json"
MODEL, EXPORT, SOURCE = "model.pt", "model.onnx", "0_source"


@dataclass(frozen=True)
class Pipeline:
    """What is to be run. `source` is the file of the model given."""

    source: Path
    steps: list[core.Step]
    folder: Path
    test_data: str = ""
    calibration_data: str = ""

    def stages(self) -> list[Path]:
        """The folders of the steps."""
        names = (f"{n}_{step.method}" for n, step in enumerate(self.steps, 1))
        return [self.folder / name for name in names]

    def plan(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {
            "source": hashlib.sha256(self.source.read_bytes()).hexdigest(),
            "steps": [{"method": s.method, **asdict(s.config), **asdict(s.tuning)}
                      for s in self.steps],
            "test_data": portable_path(self.test_data),
            "calibration_data": portable_path(self.calibration_data),
        }  # fmt: skip


def begin(pipeline: Pipeline) -> None:
    """Writes the plan, or raises ValueError where the folder holds another one's stages."""
    path = pipeline.folder / PLAN
    if not path.exists():
        write_json(path, pipeline.plan())
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path}: damaged; delete the folder or choose another") from None
    wanted = json.loads(json.dumps(pipeline.plan()))
    other = [key for key in wanted if found.get(key) != wanted[key]]
    if other:
        raise ValueError(
            f"{pipeline.folder}: holds a run with another {' and '.join(other)}; repeat that one, "
            "delete the folder or choose another --output_dir"
        )


def rehearse(
    checkpoint: Checkpoint, steps: Sequence[core.Step], calibration: core.Calibration | None
) -> None:
    """Takes all steps on a copy, without training and with little speech; raises what they do."""
    if not any(step.tuning.fine_tune_epochs for step in steps):
        return
    core.check(checkpoint, steps)
    little = calibration and replace(calibration, batches=calibration.batches[:1])
    now = first = replace(checkpoint, model=copy.deepcopy(checkpoint.model), training=None)
    for number, step in enumerate(steps, 1):
        if step.method == core.EVALUATION:
            continue
        stuck = finetuning.untrainable(now.model)
        try:
            untrained = replace(step, tuning=finetuning.Options())
            now = core.take(untrained, now, first, little)
            if step.tuning.fine_tune_epochs and stuck:
                raise ValueError(stuck)
        except ValueError as error:
            raise ValueError(f"step {number} ({step.method}) cannot work here: {error}") from None


def run(
    pipeline: Pipeline, checkpoint: Checkpoint, calibration: core.Calibration | None,
    writes: bool = True,
) -> Checkpoint:  # fmt: skip
    """Takes the steps that are not finished yet; returns the last checkpoint.

    Of several processes, one `writes`.
    """
    if writes:
        measure(pipeline.source, pipeline.folder / SOURCE, pipeline.test_data)
    first = now = replace(checkpoint, training=None)
    for step, place in zip(pipeline.steps, pipeline.stages(), strict=True):
        if (place / DONE).exists():
            now = load_checkpoint(place / MODEL)
            print(f"{place.name}: finished before")
            continue
        if writes:
            print(f"== {place.name}", flush=True)
        test_data, started = pipeline.test_data, time.monotonic()
        if step.method == core.EVALUATION:
            test_data = step.config.test_data or test_data
        else:
            start = replace(now, model=copy.deepcopy(now.model))
            now = core.take(step, start, first, calibration, place)
            now.history[-1]["commit"] = commit()
        if not writes:
            continue
        save_checkpoint(place / MODEL, now)
        measure(place / MODEL, place, test_data)
        seconds = round(time.monotonic() - started, 1)
        write_json(place / DONE, {"step": step.method, "seconds": seconds, "commit": commit()})
        finetuning.forget(place)
    return now


def measure(model: Path, place: Path, test_data: str) -> None:
    """Writes a model's figures to `place`, unless they are there.

    Its sizes; with test data also its .onnx and what that file does.
    """
    if (place / FIGURES).exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    checkpoint = load_checkpoint(model)
    figures: dict[str, Any] = {
        "bytes": model.stat().st_size,
        "parameters": sum(core.parameter_count(m) for m in checkpoint.model.modules()),
    }
    if test_data:
        to_onnx(checkpoint, place / EXPORT)
        result = evaluate(place / EXPORT, read_test_data(test_data), measure_latency=False)
        keys = ("wer", "wer_interval", "cer", "cer_interval", "words")
        figures |= {key: result[key] for key in keys} | {
            "onnx_bytes": (place / EXPORT).stat().st_size,
            "flops_per_second": flops_per_second(place / EXPORT),
            "test_data": portable_path(test_data),
        }
        print(f"   WER {result['wer']:.2%}  CER {result['cer']:.2%}  {test_data}", flush=True)
    write_json(place / FIGURES, figures)


def time_stages(pipeline: Pipeline) -> None:
    """Latency and memory of all stages' .onnx side by side, once; nothing without test data."""
    target = pipeline.folder / SPEED
    every = [pipeline.folder / SOURCE, *pipeline.stages()]
    places = [place for place in every if (place / EXPORT).exists()]
    if not pipeline.test_data or target.exists():
        return
    rows = speed_of_noise([place / EXPORT for place in places])
    keys = ("latency", "peak_rss")
    stages = [{"stage": place.name} | {key: row[key] for key in keys}
              for place, row in zip(places, rows, strict=True)]  # fmt: skip
    write_json(target, {"stages": stages, "machine": describe_machine(), "commit": commit()})
