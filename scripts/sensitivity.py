"""Scans layer by layer what compression costs a model, so that compress.py can mix settings.

    python scripts/sensitivity.py --model_path model.pt --output_dir D

Writes sensitivity.json and sensitivity.png. `compress.py --sensitivity D/sensitivity.json` with
--target_size_mb, --target_latency_ms or --max_wer_increase then picks the mix from it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asr.common.provenance import command_line, portable_path
from asr.measure.machine import provenance
from asr.network.checkpoint import load_checkpoint
from asr.runtime.cli import Parser, guarded
from asr.runtime.files import check_writable, write_json
from compress import calibration, sensitivity, settings


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_path", required=True, help="the float checkpoint")
    add("--output_dir", required=True, help="folder for sensitivity.json and sensitivity.png")
    add("--settings", nargs="+", default=list(settings.SETTINGS),
        help="METHOD:OPTION=VALUE,… each, several with + (default: precisions)")  # fmt: skip
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
        settings.parse_setting(text, args.by)
    checkpoint = load_checkpoint(args.model_path)
    dev = calibration.speech(checkpoint, args.dev_data, "dev") if args.dev_data else []
    speech = calibration.load(checkpoint, args.calibration_data, most=args.utterances)
    folder = Path(args.output_dir)
    check_writable(folder / "sensitivity.json")
    found = sensitivity.scan(checkpoint, args.settings, speech, dev[: args.dev_utterances], args.by)
    found["source"] = portable_path(found["source"])
    about = {"model": portable_path(args.model_path)} | provenance(args.command)
    write_json(folder / "sensitivity.json", about | found)
    plot(found, folder / "sensitivity.png")
    rows = [(o["distance"], row["name"], text) for row in found["layers"]
            for text, o in row["settings"].items()]  # fmt: skip
    for distance, name, text in sorted(rows, reverse=True)[:10]:
        print(f"{distance:9.5f}  {name}  {text}")
    print(f"written: {folder / 'sensitivity.json'}, {folder / 'sensitivity.png'}")
    return 0


def plot(found: dict[str, Any], path: Path) -> None:
    """The distance of every layer at every setting, in the model's order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = found["layers"]
    with_wer = found["wer"] is not None
    figure, axes = pyplot.subplots(
        1 + with_wer, 1, figsize=(10, 4 * (1 + with_wer)), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    figure.suptitle("What compressing one layer at a time costs")
    for axis, key in zip(axes[:, 0], ("distance", "wer"), strict=False):
        for text in found["settings"]:
            points = [(i, row["settings"][text][key]) for i, row in enumerate(rows)
                      if text in row["settings"]]  # fmt: skip
            if key == "wer":
                points = [(i, 100 * (value - found["wer"])) for i, value in points]
            if points:
                axis.plot(*zip(*points, strict=True), ".-", lw=0.8, ms=5, label=text)
        axis.grid(True, alpha=0.3)
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylabel("divergence a frame (nats)")
    axes[0, 0].legend(frameon=False, fontsize=8, ncols=min(3, len(found["settings"])),
                      loc="lower center", bbox_to_anchor=(0.5, 1.0))  # fmt: skip
    if with_wer:
        axes[1, 0].set_ylabel("rise of the WER (points)")
    starts: dict[str, int] = {}
    for i, row in enumerate(rows):
        parts = row["name"].split(".")
        starts.setdefault(f"block {parts[1]}" if parts[0] == "blocks" else parts[0], i)
    axes[-1, 0].set_xticks(list(starts.values()), list(starts), rotation=90, fontsize=8)
    worst = max(
        ((i, o["distance"], row["name"]) for i, row in enumerate(rows)
         for o in row["settings"].values()), key=lambda point: point[1],
    )  # fmt: skip
    axes[0, 0].annotate(worst[2], worst[:2], xytext=(6, 2), textcoords="offset points", fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
