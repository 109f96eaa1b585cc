"""Runs a study: rows of commands, each with several seeds, then their comparison.

    python experiments/studies/run_study.py experiments/studies/distillation_an4.json \\
        --output_dir runs/distillation_an4

The plan is JSON: `rows` in order of interest, each a name, `commands` (arguments of python, with
{seed}, {out}: the row's own folder, {base}: OUTPUT_DIR and the plan's own `values`) and the `model`
that they make; `once`, commands that come first; `test_data`; `seeds`; `against`: which row each
other one is compared with. All rows take their first seed before any takes its second. A row that
is finished is passed over and one that was stopped goes on, so the same command continues a study.
Writes OUTPUT_DIR/ROW_SEED.json (of evaluate.py) and OUTPUT_DIR/study.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from asr.common.metrics import paired_bootstrap
from asr.common.provenance import ROOT, command_line
from asr.measure.machine import provenance
from asr.measure.scores import align
from asr.runtime.cli import Parser, guarded, read_structured
from asr.runtime.files import write_json

KEYS = ("rows", "seeds", "test_data")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("plan", help="JSON file of the study")
    add("--output_dir", required=True, help="folder for runs and results")
    add("--rows", nargs="+", help="only these")
    add("--seeds", nargs="+", type=int, help="only these")
    add("--summary", action="store_true", help="only compare what is there")
    args = parser.parse_args(argv)
    args.command = command_line("experiments/studies/run_study.py", argv)
    return args


def read_plan(path: str) -> dict[str, Any]:
    """The plan; ValueError where keys are missing or rows have no name, commands or model."""
    plan = read_structured(path)
    missing = [key for key in KEYS if key not in plan]
    if missing:
        raise ValueError(f"{path}: {missing[0]!r} is missing")
    names = [row.get("name") for row in plan["rows"]]
    for row in plan["rows"]:
        if not {"name", "commands", "model"} <= row.keys():
            raise ValueError(f"{path}: a row needs name, commands and model, this has {list(row)}")
    other = [x for pair in plan.get("against", {}).items() for x in pair if x not in names]
    if other:
        raise ValueError(f"{path}: no row is named {other[0]!r}")
    return plan


def run_command(text: str, log: Path) -> None:
    """Runs python with these arguments from the project's root; ValueError where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"$ python {text}\n")
        file.flush()
        done = subprocess.run(
            [sys.executable, *shlex.split(text)], cwd=ROOT, env=os.environ | ENVIRONMENT,
            stdout=file, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if done.returncode:
        raise ValueError(f"python {text}: failed, see {log}; the same command goes on from there")


def run_row(plan: dict[str, Any], row: dict[str, Any], seed: int, base: Path) -> None:
    """The commands of a row with a seed, and its result."""
    name = f"{row['name']}_{seed}"
    result = base / f"{name}.json"
    if result.exists():
        return
    print(f"== {name}", flush=True)
    out = base / name
    values = {"seed": seed, "out": out, "base": base, **plan.get("values", {})}
    for command in row["commands"]:
        run_command(command.format(**values), base / f"{name}.log")
    model = row["model"].format(**values)
    test_data = plan["test_data"]
    run_command(
        f"evaluate.py --model_path {model} --test_data {test_data} --no_texts --no_speed "
        f"--output_file {result}",
        base / f"{name}.log",
    )


def summary(plan: dict[str, Any], base: Path) -> dict[str, Any]:
    """Per row the WER of each seed and their mean; per pair the difference with its interval.

    The interval is over utterances, whose errors are summed over the seeds that both rows have.
    """
    found: dict[str, dict[int, Any]] = {}
    for row in plan["rows"]:
        for seed in plan["seeds"]:
            path = base / f"{row['name']}_{seed}.json"
            if path.exists():
                result = json.loads(path.read_text(encoding="utf-8"))
                found.setdefault(row["name"], {})[seed] = result
    rows = [
        {
            "row": name, "wer": {str(seed): r["wer"] for seed, r in results.items()},
            "mean_wer": float(np.mean([r["wer"] for r in results.values()])),
            "bytes": next(iter(results.values()))["bytes"],
            "parameters": next(iter(results.values()))["params"],
        }
        for name, results in found.items()
    ]  # fmt: skip
    pairs = []
    for name, other in plan.get("against", {}).items():
        seeds = sorted(found.get(name, {}).keys() & found.get(other, {}).keys())
        if not seeds:
            continue
        mine, theirs = (total_errors([found[n][s] for s in seeds]) for n in (name, other))
        rows_of = found[name][seeds[0]]["utterances"]
        words = [len(seeds) * row["words"] for row in align(rows_of, rows_of)[0]]
        pairs.append({"row": name, "against": other, "seeds": seeds,
                      **paired_bootstrap(mine, theirs, words)})  # fmt: skip
    missing = [f"{row['name']}_{seed}" for row in plan["rows"] for seed in plan["seeds"]
               if seed not in found.get(row["name"], {})]  # fmt: skip
    return {"rows": rows, "pairs": pairs, "missing": missing}


def total_errors(results: list[dict[str, Any]]) -> list[int]:
    """Word errors of each utterance, summed over results of the same utterances."""
    first = results[0]["utterances"]
    aligned = [align(result["utterances"], first)[0] for result in results]
    return [sum(row["word_errors"] for row in same) for same in zip(*aligned, strict=True)]


def run(args: argparse.Namespace) -> int:
    plan = read_plan(args.plan)
    base = Path(args.output_dir).resolve()
    rows = [row for row in plan["rows"] if not args.rows or row["name"] in args.rows]
    if not args.summary:
        values = {"base": base, **plan.get("values", {})}
        for number, command in enumerate(plan.get("once", [])):
            done = base / f"once_{number}.done"
            if not done.exists():
                print(f"== once {number}", flush=True)
                run_command(command.format(**values), base / "once.log")
                done.touch()
        for seed in args.seeds or plan["seeds"]:
            for row in rows:
                run_row(plan, row, seed, base)
    found = summary(plan, base)
    about = {"plan": Path(args.plan).name} | provenance(args.command)
    write_json(base / "study.json", about | found)
    for row in found["rows"]:
        seeds = ", ".join(f"{wer:.2%}" for wer in row["wer"].values())
        print(
            f"{row['row']:20} {row['parameters'] / 1e6:6.2f} M  WER {row['mean_wer']:.2%}  {seeds}"
        )
    for pair in found["pairs"]:
        low, high = pair["interval"]
        print(f"{pair['row']} against {pair['against']}: {100 * pair['delta']:+.2f} points "
              f"({100 * low:+.2f} to {100 * high:+.2f})")  # fmt: skip
    if found["missing"]:
        print("missing: " + ", ".join(found["missing"]))
    return 0


def main(argv: list[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
