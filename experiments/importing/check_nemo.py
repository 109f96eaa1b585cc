"""Imports of models that NeMo built and saved, against NeMo's own numbers.

    python experiments/importing/check_nemo.py --python NEMO_PYTHON --output_path R.json

NEMO_PYTHON is the Python of an environment with nemo_toolkit (see nemo_itself.py). The exit code
is 1 if a log-probability differs by more than 1e-4, or if another runtime reads other tokens from
our export of an import than from NeMo's own export.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import numpy.typing as npt
import torch

from asr.common.provenance import command_line
from asr.importing.nemo import import_nemo, vowel
from asr.measure.machine import provenance
from asr.runtime.cli import Parser, guarded
from asr.runtime.features import log_mel
from asr.runtime.files import check_writable, write_json
from experiments.importing.runtimes import compare_exports

NAMES = ("characters", "pieces", "hybrid", "languages")
EXPORTED = "pieces"
TOLERANCE = 1e-4  # of log-probabilities
LANGUAGE, SIZES = "hi", {"en": 90, "hi": 80}
SEED = 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    parser.add_argument("--python", required=True, help="the Python that has NeMo")
    parser.add_argument("--work_dir", help="keeps what NeMo writes (default: a temporary folder)")
    parser.add_argument("--output_path", required=True, help="JSON to write")
    args = parser.parse_args(argv)
    args.command = command_line("experiments/importing/check_nemo.py", argv)
    return args


def build(python: str, folder: Path) -> str:
    """Has NeMo write its models to the folder; returns its version."""
    np.save(folder / "audio.npy", recording())
    script = Path(__file__).with_name("nemo_itself.py")
    done = subprocess.run([python, str(script), str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{python}: {' '.join(done.stderr.split())[-300:]}")
    return (folder / "version.txt").read_text()


def recording() -> npt.NDArray[np.float32]:
    """Two seconds like speech, (N,) at 16 kHz."""
    speech = vowel(35_000, 16_000)
    noise = np.random.default_rng(SEED).normal(0, 0.01, len(speech))
    return (speech + noise).astype(np.float32)


def compare(folder: Path, name: str) -> dict[str, Any]:
    """The largest differences of features and log-probabilities between NeMo and the import."""
    theirs = np.load(folder / f"{name}.npz")
    language = LANGUAGE if name == "languages" else ""
    checkpoint = import_nemo(folder / f"{name}.nemo", language).checkpoint
    features = log_mel(recording(), checkpoint.features)  # (T, n_mels)
    with torch.inference_mode():
        found = checkpoint.model(torch.from_numpy(features)[None]).log_probs[0].numpy()
    expected = theirs["log_probs"]  # (T', V + 1)
    if language:  # the softmax is over this language and the blank alone
        expected = expected[:, [*range(SIZES["en"], sum(SIZES.values())), -1]]
        expected = expected - np.logaddexp.reduce(expected, axis=1, keepdims=True)
    last = expected.shape[1] - 1
    expected = expected[:, [last, *range(1, last), 0]]
    if found.shape != expected.shape or features.shape != theirs["features"].shape:
        raise ValueError(f"{name}: NeMo gives {expected.shape}, the import {found.shape}")
    return {
        "model": name, "frames": len(features), "tokens": last + 1,
        "features": float(abs(features - theirs["features"]).max()),
        "log_probs": float(abs(found - expected).max()),
        "spread": float(expected.std()),
        "same_tokens": bool((found.argmax(1) == expected.argmax(1)).all()),
    }  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Builds, compares, prints and writes."""
    check_writable(args.output_path)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.work_dir or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        version = build(args.python, folder)
        rows = [compare(folder, model) for model in NAMES]
        exports = compare_exports(folder, EXPORTED)
    for row in rows:
        print(f"NeMo {version} {row['model']}: log-probabilities {row['log_probs']:.1e}")
    about = provenance(args.command, SEED) | {"nemo": version}
    for row in exports:
        print(f"{row['runtime']}: {'the same' if row['same_tokens'] else 'other'} tokens")
    write_json(args.output_path, about | {"rows": rows, "exports": exports})
    good = all(row["log_probs"] <= TOLERANCE for row in rows)
    return int(not (good and all(row["same_tokens"] for row in exports)))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
