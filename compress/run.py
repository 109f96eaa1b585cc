"""A compression from file to file: what is asked for, what comes out, and what is written."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asr.common.provenance import command_line, commit, portable_path
from asr.corpus.manifest import Utterance
from asr.measure import final_report
from asr.measure.evaluation import evaluate, measure_speed, read_test_data
from asr.measure.final_report import FLAGS, Targets, targets_from
from asr.measure.machine import default_threads
from asr.measure.scores import compare
from asr.network.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from asr.network.export import to_onnx
from asr.network.processes import is_first
from asr.runtime.files import write_atomically
from compress import calibration, core, finetuning, pipeline, recipes, report
from compress.mixing import Goal, Mix, choose_mix, dev_speech
from compress.pipeline import Pipeline
from compress.sensitivity import read_scan
from compress.settings import of_modules, parse_setting

CHECKPOINT, REPORT = "model.pt", "compression.json"
MIXING = "--target_size_mb, --target_latency_ms or --max_wer_increase"


@dataclass(frozen=True)
class Compressed:
    """What a compression has made."""

    model_path: Path | None  # None of a dry run
    bytes_before: int  # of the files, without resume states
    bytes_after: int
    report: dict[str, Any]  # of layers and files, and with test data of both models: JSON types


def compress(
    model_path: str | Path, output_dir: str | Path | None = None, *, method: str = "",
    recipe: str | Path = "", target_size_mb: float = 0.0, target_latency_ms: float = 0.0,
    max_wer_increase: float | None = None, calibration_data: str = "", test_data: str = "",
    dev_data: str = "", sensitivity: str = "", threads: int = 0, dry_run: bool = False,
    **options: Any,
) -> Compressed:  # fmt: skip
    """Makes a checkpoint smaller, into `output_dir`/model.pt, and prints how it goes.

    By one `method` with its `options`, by the steps of a `recipe`, or by the mix of settings that
    makes a file of `target_size_mb`, runs in `target_latency_ms` or keeps the rise of the dev WER
    (a share of it) within `max_wer_increase`. The meaning of all is that of compress.py's flags; of
    a recipe the latency is a target of its report. Raises ValueError, with nothing written, for
    what does not fit together or cannot be read.
    """
    given = {
        "model_path": model_path, "output_dir": output_dir, "method": method, "recipe": recipe,
        "target_size_mb": target_size_mb, "target_latency_ms": target_latency_ms,
        "calibration_data": calibration_data, "test_data": test_data, "dev_data": dev_data,
        "sensitivity": sensitivity, "threads": threads,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value} | options
    if max_wer_increase is not None:
        given["max_wer_increase"] = max_wer_increase
    goal = Goal(target_size_mb, 0.0 if recipe else target_latency_ms, max_wer_increase)
    targets = targets_from(options | ({"target_latency_ms": target_latency_ms} if recipe else {}))
    options = {name: value for name, value in options.items() if name not in FLAGS}
    if targets != Targets() and not recipe:
        raise ValueError("targets are checked in the report of a --recipe: give one")
    steps = recipes.expand(choose(method, recipe, options, goal))
    if sensitivity and steps:
        raise ValueError(f"--sensitivity goes with {MIXING}")
    if dev_data and max_wer_increase is None:
        raise ValueError("--dev_data goes with --max_wer_increase")
    if threads < 0:
        raise ValueError(f"--threads {threads} must be at least 0")
    if not output_dir and not dry_run:
        raise ValueError("--output_dir is needed")
    threads = threads or default_threads()
    torch.set_num_threads(threads)
    source, folder = Path(model_path), Path(output_dir or "")
    if not dry_run and not recipe:
        check_output(folder, source)
    first = is_first()
    command = command_line("compress.py", as_flags(given))
    checkpoint = load_checkpoint(source)
    tests = read_test_data(test_data) if test_data else []
    scan = read_scan(sensitivity, checkpoint.model) if sensitivity else None
    dev = dev_speech(checkpoint, dev_data) if max_wer_increase is not None else []
    speech = load_speech(checkpoint, calibration_data, steps, scan)
    say_unmatched(steps[:1], checkpoint.model)
    if recipe and not dry_run:
        plan = Pipeline(source, steps, folder, test_data, calibration_data)
        return run_recipe(plan, checkpoint, speech, targets, command, first)
    before = None
    if tests and not dry_run and first:
        before = measure_exported("before", checkpoint, tests, threads)
    started = time.monotonic()
    mix = Mix(steps, {})
    if goal != Goal():
        mix = choose_mix(checkpoint, scan, speech, goal, dev)
        steps = mix.steps
    if dry_run:
        steps = [replace_fields(step, tuning=finetuning.Options()) for step in steps]
        result, rows, sizes = compress_checkpoint(checkpoint, steps, speech, None)
        say_unmatched(steps[1:] if not mix.about else [], result.model)
        print(report.layer_table(rows))
        print(report.summary_table(rows, *sizes))
        print("nothing was written")
        return Compressed(None, *sizes, report.as_json(rows, *sizes))
    existed = folder.exists()
    try:
        result, rows, sizes = compress_checkpoint(checkpoint, steps, speech, folder)
        if not first:
            return Compressed(None, *sizes, report.as_json(rows, *sizes))
        save_checkpoint(folder / CHECKPOINT, result)
        seconds = time.monotonic() - started
        contents = {
            "command": command,
            "commit": commit(),
            "source": portable_path(str(source)),
            "history": result.history,
            "seconds": round(seconds, 1),
            **({"mix": mix.about} if mix.about else {}),
            **report.as_json(rows, *sizes),
        }
        write_report(folder, contents)
    except BaseException:
        if not (folder / REPORT).exists():  # the next run would not know the model for our own
            (folder / CHECKPOINT).unlink(missing_ok=True)
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise
    say_unmatched(steps[1:] if not mix.about else [], result.model)
    print(report.summary_table(rows, *sizes))
    print(f"{folder / CHECKPOINT} written in {seconds:.0f} s", flush=True)
    if before:
        after = measure_exported("after", result, tests, threads)
        contents["evaluation"] = side_by_side(before, after)
        write_report(folder, contents)
    finetuning.forget(folder)
    return Compressed(folder / CHECKPOINT, *sizes, contents)


def run_recipe(
    plan: Pipeline, checkpoint: Checkpoint, speech: core.Calibration | None, targets: Targets,
    command: str, first: bool,
) -> Compressed:  # fmt: skip
    """The stages that are not finished yet, and the report of all."""
    folder = plan.folder
    if not (folder / pipeline.PLAN).exists():
        check_output(folder, plan.source)
    pipeline.rehearse(checkpoint, plan.steps, speech)
    if first:
        pipeline.begin(plan)
    started = time.monotonic()
    before, bytes_before = report.layer_sizes(checkpoint.model), report.file_bytes(checkpoint)
    result = pipeline.run(plan, checkpoint, speech, first)
    rows = report.compare(before, result.model, plan.steps)
    sizes = bytes_before, report.file_bytes(result)
    if not first:
        return Compressed(None, *sizes, report.as_json(rows, *sizes))
    save_checkpoint(folder / CHECKPOINT, result)
    about = {"command": command, "commit": commit()}
    contents = about | {
        "source": portable_path(str(plan.source)),
        "history": result.history,
        "seconds": round(time.monotonic() - started, 1),
        **report.as_json(rows, *sizes),
    }
    write_report(folder, contents)
    print(report.summary_table(rows, *sizes))
    pipeline.time_stages(plan)
    stages = final_report.read_stages(folder)
    written = final_report.write(folder, stages, targets, about)
    print(final_report.markdown(stages, targets))
    print("written: " + ", ".join(map(str, [folder / CHECKPOINT, *written])))
    return Compressed(folder / CHECKPOINT, *sizes, contents)


def as_flags(settings: dict[str, Any]) -> list[str]:
    """The flags of compress.py that say the same as the arguments of `compress`."""
    flags: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", str(value)]
    return flags


def choose(method: str, recipe: str | Path, options: dict[str, Any], goal: Goal) -> list[core.Step]:
    """The steps of a method with its options or of a recipe; none for a mix that is to be found."""
    mixing = goal != Goal()
    if bool(method) + bool(recipe) + mixing != 1:
        raise ValueError(f"give either --method, --recipe, {MIXING}")
    if method:
        return [recipes.make_step(method, options)]
    idle = options.keys() - ({"fine_tune_data"} if recipe else set())
    if idle:
        raise ValueError(f"--{min(idle)} goes with --method or into the recipe's steps")
    return recipes.read_recipe(str(recipe), **options) if recipe else []


def say_unmatched(steps: Sequence[core.Step], model: nn.Module) -> None:
    """Prints a note for each pattern that fits no layer of the model, so has no effect."""
    kinds = (nn.Linear, *core.CONVOLUTIONS)
    layers = [n for n, m in model.named_modules() if type(m) in kinds or core.is_replaced(m)]
    for step in steps:
        whole = of_modules(step)
        names = [n for n, _ in model.named_modules()] if whole else layers
        for line in core.unmatched(step, names):
            print(f"note: {line}: {step.method} works without it")


def measure_exported(
    label: str, checkpoint: Checkpoint, tests: Sequence[Utterance], threads: int
) -> dict[str, Any]:
    """Error rates and speed of the checkpoint's .onnx, which is what a device runs; printed.

    The file is temporary. Speed and memory are those of one thread.
    """
    print(f"{label:6}  exporting and measuring on {len(tests)} utterances …", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.onnx"
        to_onnx(checkpoint, path)
        exported = time.monotonic()
        result = evaluate(path, tests, threads=threads, measure_latency=False)
        result |= measure_speed(path, tests)
    print(
        f"{label:6}  WER {result['wer']:.2%}  CER {result['cer']:.2%}  "
        f"latency {1000 * result['latency_p50']:.0f} ms, one thread  (.onnx, "
        f"{result['bytes'] / 1e6:.2f} MB; exported in {exported - started:.0f} s, "
        f"measured in {time.monotonic() - exported:.0f} s)",
        flush=True,
    )
    return result


def load_speech(
    checkpoint: Checkpoint, data: str, steps: Sequence[core.Step], found: dict[str, Any] | None
) -> core.Calibration | None:
    """Calibration speech if the steps, or those that a scan offers, or the scan itself need it."""
    scanning = not steps and found is None
    settings = found["settings"] if found else []
    possible = steps or [step for text in settings for step in parse_setting(text)]
    if not (data or scanning or any(map(recipes.needs_calibration, possible))):
        return None
    return calibration.load(checkpoint, data, most=16 if scanning else 96)


def compress_checkpoint(
    checkpoint: Checkpoint, steps: Sequence[core.Step], speech: core.Calibration | None,
    folder: Path | None,
) -> tuple[Checkpoint, list[report.Row], tuple[int, int]]:  # fmt: skip
    """The new checkpoint, its report, and the bytes of the files before and after."""
    before = report.layer_sizes(checkpoint.model)
    bytes_before = report.file_bytes(checkpoint)
    result = core.run(checkpoint, steps, speech, folder)
    for entry in result.history[len(checkpoint.history) :]:
        entry["commit"] = commit()
    rows = report.compare(before, result.model, steps)
    return result, rows, (bytes_before, report.file_bytes(result))


def check_output(folder: Path, source: Path) -> None:
    """Refuses to overwrite what this program has not made, and the model that is read.

    Says so where an earlier model of this program will be replaced.
    """
    target = folder / CHECKPOINT
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: not a folder; choose another --output_dir")
    if not target.exists():
        return
    if target.resolve() == source.resolve():
        raise ValueError(f"{target}: is the model to compress; choose another --output_dir")
    if not (folder / REPORT).exists():
        raise ValueError(
            f"{target}: would be overwritten and was not made by compress.py; "
            "choose another --output_dir"
        )
    print(f"{target}: is there from an earlier run and will be replaced")


def write_report(folder: Path, contents: dict[str, Any]) -> None:
    """Says how the model beside it was made; `check_output` takes such a folder for our own."""
    write_atomically(folder / REPORT, json.dumps(contents, indent=1, ensure_ascii=False) + "\n")


def side_by_side(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Error rates, size, latency and memory of both .onnx files, and their difference."""
    keys = ("wer", "cer", "bytes", "latency_p50", "rtf", "peak_rss", "words")
    short = [{key: result[key] for key in keys} for result in (before, after)]
    return {"before": short[0], "after": short[1], "paired": compare(after, before)}
