"""Peak memory and time of importing, compressing and exporting public models' sizes.

    python experiments/importing/memory.py --output_path experiments/importing/memory.json

Archives of random weights in NeMo's names are made for each model; each command then runs in a
process of its own, whose highest resident memory (mapped files included) the system tells.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import yaml
from torch import Tensor

from asr.common.provenance import command_line, commit
from asr.importing.weights import PARTS, TENSORS
from asr.measure.machine import provenance
from asr.network.model import ConformerCTC
from asr.runtime.cli import Parser, guarded
from asr.runtime.config import ModelConfig
from asr.runtime.files import check_writable, write_json
from experiments.importing.sizes import MODELS

ROOT = Path(__file__).resolve().parents[2]
SEED = 0
NAMES = ("stt_en_conformer_ctc_small", "stt_en_conformer_ctc_large", "parakeet-ctc-0.6b")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--models", default=",".join(NAMES), help="of sizes.py, commas between")
    add("--steps", default="", help="import, compress to int8, ..., export int4 (default: all)")
    add("--work_dir", help="keeps what is made, for a later run of other steps")
    add("--output_path", required=True, help="JSON to write, or with other steps' rows to add to")
    args = parser.parse_args(argv)
    args.command = command_line("experiments/importing/memory.py", argv)
    return args


def nemo_name(name: str, separable: bool) -> str:
    """NeMo's name of one of our tensors."""
    module, _, tensor = name.rpartition(".")
    if module == "head":
        return f"decoder.decoder_layers.0.{tensor}"
    if module == "subsampling.out":
        return f"encoder.pre_encode.out.{tensor}"
    if module.startswith("subsampling."):
        _, kind, stage = module.split(".")
        number = 2 * int(stage)
        if separable:  # one, ReLU, then depthwise, pointwise, ReLU, ...
            number = 0 if stage == "0" else 3 * int(stage) - 1 + (kind == "pointwise")
        return f"encoder.pre_encode.conv.{number}.{tensor}"
    theirs = {ours: nemo for nemo, ours in PARTS.items()}
    tensors = {ours: nemo for nemo, ours in TENSORS.items()}
    _, block, place = module.split(".", 2)
    return f"encoder.layers.{block}.{theirs[place]}.{tensors.get(tensor, tensor)}"


def write_archive(model: str, path: Path) -> None:
    """A .nemo file of the sizes of a public model, its weights as they are initialised."""
    torch.manual_seed(SEED)
    config = ModelConfig(**MODELS[model])  # type: ignore[arg-type]
    separable = config.subsampling == "dw_striding"
    state: dict[str, Tensor] = {
        nemo_name(name, separable): x for name, x in ConformerCTC(config).state_dict().items()
    }
    labels = [chr(0x4E00 + i) for i in range(config.vocab_size - 1)]
    about = {
        "target": "nemo.EncDecCTCModel", "nemo_version": "3.0.0", "labels": labels,
        "preprocessor": {"features": config.n_mels, "window_size": 0.025},
        "encoder": {
            "feat_in": config.n_mels, "n_layers": config.n_layers, "d_model": config.d_model,
            "n_heads": config.n_heads, "conv_kernel_size": config.conv_kernel_size,
            "subsampling": config.subsampling, "subsampling_factor": config.subsampling_factor,
            "subsampling_conv_channels": config.subsampling_channels,
        },
        "decoder": {"vocabulary": list(labels), "num_classes": len(labels)},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=path.parent) as name, tarfile.open(path, "w") as tar:
        folder = Path(name)
        torch.save(state, folder / "model_weights.ckpt")
        (folder / "model_config.yaml").write_text(yaml.safe_dump(about), encoding="utf-8")
        for file in sorted(folder.iterdir()):
            tar.add(file, f"./{file.name}")


def commands(folder: Path) -> Iterator[tuple[str, list[str], Path]]:
    """What is measured, its command line and the file it makes."""
    model, archive = folder / "model.pt", folder / "model.nemo"
    flags = ["--model_path", str(archive), "--output_path", str(model)]
    yield "import", ["scripts/import_model.py", *flags], model
    sources = {"float32": model}
    for precision in ("int8", "int4"):
        place = folder / precision
        flags = ["--model_path", str(model), "--output_dir", str(place), "--threads", "1"]
        how = ["--method", "quantization", "--precision", precision]
        sources[precision] = place / "model.pt"
        yield f"compress to {precision}", ["compress.py", *how, *flags], sources[precision]
    for precision, source in sources.items():
        target = folder / f"{precision}.onnx"
        flags = ["--model_path", str(source), "--output_path", str(target)]
        yield f"export {precision}", ["scripts/export_onnx.py", *flags], target


def measure(argv: list[str]) -> dict[str, Any]:
    """Runs one command; its exit code, seconds and peak memory in bytes."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        lines = said.read().decode("utf-8", "replace").splitlines()
    row: dict[str, Any] = {
        "exit_code": process.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": 1024 * usage.ru_maxrss,
    }
    if process.returncode:
        row["said"] = lines[-1].split(": ", 1)[-1] if lines else ""
    return row


def run(args: argparse.Namespace) -> int:
    """Measures model after model; the JSON grows with each row."""
    check_writable(args.output_path)
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(args.work_dir or temporary) / name
            place.mkdir(parents=True, exist_ok=True)
            archive = place / "model.nemo"
            if not archive.exists():  # made in a process of its own, whose memory goes with it
                code = "from experiments.importing.memory import Path, write_archive; "
                code += f"write_archive({name!r}, Path({str(archive)!r}))"
                subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
            size = archive.stat().st_size
            for what, argv, made in commands(place):
                if args.steps and what not in args.steps.split(","):
                    continue
                row = {"model": name, "what": what, "archive_bytes": size, **measure(argv)}
                row["ratio"] = round(row["peak_bytes"] / size, 2)
                row["bytes"] = made.stat().st_size if made.exists() else 0
                print(row, flush=True)
                add_row(Path(args.output_path), row | {"commit": commit()}, args.command)
    return 0


def add_row(path: Path, row: dict[str, Any], command: str) -> None:
    """Puts a row into the JSON, in the place of an earlier one of the same step."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [r for r in rows if (r["model"], r["what"]) != (row["model"], row["what"])]
    write_json(path, provenance(command, SEED) | {"rows": [*rows, row]})


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
