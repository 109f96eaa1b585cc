"""Makes a trained checkpoint smaller: a checkpoint and a method in, a smaller checkpoint out.

    python compress.py --model_path model.pt --method quantization --output_dir runs/int8

Or several methods in order (--recipe), or the mix of settings that fits a size (--target_size_mb)
or an error rate (--max_wer_increase).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import Field, fields
from dataclasses import replace as replace_fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from asr.common.provenance import command_line, commit, portable_path
from asr.corpus.manifest import Utterance
from asr.measure.evaluation import compare, evaluate, measure_speed, read_test_data
from asr.measure.machine import default_threads
from asr.network.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from asr.network.export import to_onnx
from asr.runtime.cli import Parser, add_flag, add_flags, guarded, number
from asr.runtime.files import write_atomically
from compress import calibration, core, finetuning, report, sensitivity
from compress.registry import methods

CHECKPOINT, REPORT = "model.pt", "compression.json"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, with `steps`: one of the method's flags, or those of the recipe."""
    available = methods()
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--method", choices=available, help="what to do; several in order by --recipe")
    add("--recipe", metavar="FILE", help="JSON or TOML: a list of steps, each a method and options")
    add("--model_path", required=True, help="the checkpoint to compress")
    add("--output_dir", help=f"folder for {CHECKPOINT} and {REPORT}")
    add("--calibration_data", default="", help="speech for the options that look at activations")
    add("--test_data", help="export before and after, and measure both .onnx on this speech")
    add("--threads", type=int, default=0,
        help="processor threads (default: the idle cores but one, at least 1)")  # fmt: skip
    add("--target_size_mb", type=number, default=0.0, help="mix settings for a file of this size")
    add("--max_wer_increase", type=number, help="mix settings for this relative rise of dev WER")
    add("--dev_data", default="", help="speech to measure that on (default: dev data of training)")
    add("--sensitivity", default="", metavar="FILE", help="scan of scripts/sensitivity.py for this")
    add("--dry_run", action="store_true", help="show what would happen, layer by layer")
    options = add_options(parser, available)
    args = parser.parse_args(argv)
    given = {name: value for name in options if (value := getattr(args, name)) is not None}
    mix = (args.target_size_mb, args.max_wer_increase) != (0.0, None)
    if bool(args.method) + bool(args.recipe) + mix != 1:
        parser.error("give either --method, --recipe, --target_size_mb or --max_wer_increase")
    if args.target_size_mb < 0 or (args.max_wer_increase or 0) < 0:
        parser.error("--target_size_mb must be above 0, --max_wer_increase not below 0")
    if args.target_size_mb and args.max_wer_increase is not None:
        parser.error("give either --target_size_mb or --max_wer_increase")
    if args.threads < 0:
        parser.error(f"--threads {args.threads} must be at least 0")
    if args.sensitivity and not mix:
        parser.error("--sensitivity goes with --target_size_mb or --max_wer_increase")
    if args.dev_data and args.max_wer_increase is None:
        parser.error("--dev_data goes with --max_wer_increase")
    if not args.output_dir and not args.dry_run:
        parser.error("--output_dir is needed")
    if given and not args.method:
        parser.error(f"--{min(given)} goes with --method or into the recipe's steps")
    if mix:
        args.steps = []
    elif args.recipe:
        args.steps = core.read_recipe(args.recipe)
    else:
        args.steps = [core.make_step(args.method, given)]
    args.command = command_line("compress.py", argv)
    return args


def add_options(parser: Parser, available: dict[str, ModuleType]) -> list[str]:
    """A group of flags a method, those of several in one of their own; the names of all."""
    owners: dict[str, dict[str, Field[Any]]] = {}
    for method, module in available.items():
        for f in fields(module.Config):
            owners.setdefault(f.name, {})[method] = f
    shared = {name: takers for name, takers in owners.items() if len(takers) > 1}
    group = parser.add_argument_group("several methods", "Options of more than one method.")
    for takers in shared.values():
        if len(takers) == len(available):
            texts = {"every method": next(iter(takers.values())).metadata["help"]}
        else:
            texts = {method: f.metadata["help"] for method, f in takers.items()}
        text = "; ".join(f"{method}: {text}" for method, text in texts.items())
        add_flag(group, next(iter(takers.values())), text)
    for method, module in available.items():
        group = parser.add_argument_group(method, (module.__doc__ or "").splitlines()[0])
        add_flags(group, module.Config, skip=shared)
    group = parser.add_argument_group("fine-tuning", (finetuning.__doc__ or "").splitlines()[0])
    add_flags(group, finetuning.Options)
    return [*owners, *(f.name for f in fields(finetuning.Options))]


def run(args: argparse.Namespace) -> int:
    threads = args.threads or default_threads()
    torch.set_num_threads(threads)
    folder = Path(args.output_dir or "")
    if not args.dry_run:
        check_output(folder, Path(args.model_path))
    checkpoint = load_checkpoint(args.model_path)
    tests = read_test_data(args.test_data) if args.test_data else []
    found = sensitivity.read_scan(args.sensitivity, checkpoint.model) if args.sensitivity else None
    measured = args.max_wer_increase is not None
    dev = sensitivity.dev_speech(checkpoint, args.dev_data) if measured else []
    speech = load_speech(args, checkpoint, found)
    say_unmatched(args.steps[:1], checkpoint.model)
    before = None
    if tests and not args.dry_run:
        before = measure_exported("before", checkpoint, tests, threads)
    started = time.monotonic()
    if not args.steps:
        args.steps = sensitivity.choose_steps(
            checkpoint, found, speech, 1e6 * args.target_size_mb, args.max_wer_increase, dev
        )
    if args.dry_run:
        steps = [replace_fields(step, tuning=finetuning.Options()) for step in args.steps]
        result, rows, sizes = compress_checkpoint(checkpoint, steps, speech, None)
        say_unmatched(args.steps[1:], result.model)
        print(report.layer_table(rows))
        print(report.summary_table(rows, *sizes))
        print("nothing was written")
        return 0
    existed = folder.exists()
    try:
        result, rows, sizes = compress_checkpoint(checkpoint, args.steps, speech, folder)
        for entry in result.history[len(checkpoint.history) :]:
            entry["commit"] = commit()
        save_checkpoint(folder / CHECKPOINT, result)
        seconds = time.monotonic() - started
        contents = {
            "command": args.command,
            "commit": commit(),
            "source": portable_path(args.model_path),
            "history": result.history,
            "seconds": round(seconds, 1),
            **report.as_json(rows, *sizes),
        }
        write_report(folder, contents)
    except BaseException:
        if not (folder / REPORT).exists():  # the next run would not know the model for our own
            (folder / CHECKPOINT).unlink(missing_ok=True)
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise
    say_unmatched(args.steps[1:], result.model)
    print(report.summary_table(rows, *sizes))
    print(f"{folder / CHECKPOINT} written in {seconds:.0f} s", flush=True)
    if before:
        after = measure_exported("after", result, tests, threads)
        write_report(folder, contents | {"evaluation": side_by_side(before, after)})
    finetuning.forget(folder)
    return 0


def say_unmatched(steps: Sequence[core.Step], model: nn.Module) -> None:
    """Prints a note for each pattern that fits no layer of the model, so has no effect."""
    kinds = (nn.Linear, *core.CONVOLUTIONS)
    layers = [n for n, m in model.named_modules() if type(m) in kinds or core.is_replaced(m)]
    for step in steps:
        whole = sensitivity.of_modules(step)
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
    args: argparse.Namespace, checkpoint: Checkpoint, found: dict[str, Any] | None
) -> core.Calibration | None:
    """Calibration speech if the steps, or those that a scan offers, or the scan itself need it."""
    scanning = not args.steps and found is None
    settings = found["settings"] if found else []
    possible = args.steps or [sensitivity.parse_setting(text) for text in settings]
    if not (args.calibration_data or scanning or any(map(core.needs_calibration, possible))):
        return None
    return calibration.load(checkpoint, args.calibration_data, most=16 if scanning else 96)


def compress_checkpoint(
    checkpoint: Checkpoint, steps: Sequence[core.Step], speech: core.Calibration | None,
    folder: Path | None,
) -> tuple[Checkpoint, list[report.Row], tuple[int, int]]:  # fmt: skip
    """The new checkpoint, its report, and the bytes of the files before and after."""
    before = report.layer_sizes(checkpoint.model)
    bytes_before = report.file_bytes(checkpoint)
    result = core.run(checkpoint, steps, speech, folder)
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


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
