"""Scans layer by layer what compression costs: scripts/sensitivity.py --model_path M --output_dir D

Writes sensitivity.json and sensitivity.png. `compress.py --sensitivity D/sensitivity.json` with
--target_size_mb or --max_wer_increase then picks the mixed setting from it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asr.checkpoint import load_checkpoint
from asr.cli import guarded
from asr.evaluation import write_json
from asr.machine import command_line, commit, describe_machine, portable_path
from compress import calibration, sensitivity


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model_path", required=True, help="the float checkpoint")
    add("--output_dir", required=True, help="folder for sensitivity.json and sensitivity.png")
    add("--settings", nargs="+", default=list(sensitivity.SETTINGS),
        help="METHOD:OPTION=VALUE,… each (default: int8, int4 and ternary)")  # fmt: skip
    add("--calibration_data", default="", help="speech (default: that of training)")
    add("--utterances", type=int, default=16, help="of it, for the distance (default: 16)")
    add("--dev_data", help="also measure the word error rate on this; no test data")
    add("--dev_utterances", type=int, default=50, help="of it, at most (default: 50)")
    add("--by", choices=("layer", "module"), default="layer", help="one at a time (default: layer)")
    args = parser.parse_args(argv)
    for name in ("utterances", "dev_utterances"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    args.command = command_line("scripts/sensitivity.py", argv)
    return args


def run(args: argparse.Namespace) -> int:
    for text in args.settings:
        sensitivity.parse_setting(text)
    checkpoint = load_checkpoint(args.model_path)
    dev = calibration.speech(args.dev_data, "dev")[: args.dev_utterances] if args.dev_data else []
    speech = calibration.load(checkpoint, args.calibration_data, most=args.utterances)
    found = sensitivity.scan(checkpoint, args.settings, speech, dev, args.by)
    found["source"] = portable_path(found["source"])
    about = {"model": portable_path(args.model_path), "command": args.command,
             "commit": commit(), "machine": describe_machine()}  # fmt: skip
    folder = Path(args.output_dir)
    write_json(folder / "sensitivity.json", about | found)
    sensitivity.plot(found, folder / "sensitivity.png")
    rows = [(o["distance"], row["name"], text) for row in found["layers"]
            for text, o in row["settings"].items()]  # fmt: skip
    for distance, name, text in sorted(rows, reverse=True)[:10]:
        print(f"{distance:9.5f}  {name}  {text}")
    print(f"written: {folder / 'sensitivity.json'}, {folder / 'sensitivity.png'}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return guarded(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
