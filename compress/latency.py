"""What layers and files take of this machine: milliseconds for 10 s of audio on one thread.

A layer or module is timed alone, as it is exported, with the shapes that it is called with; those
that compute the same are timed once. What the rest of the file takes follows from the whole file's
latency, waveform to text, as the report of a recipe measures it.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn

from asr.measure.benchmark import NOISE_SECONDS, speed_of_noise
from asr.network.checkpoint import Checkpoint
from asr.network.export import as_exported, to_onnx
from asr.network.model import ConformerCTC
from asr.network.onnx_graph import EXAMPLE, part_graph, signature
from asr.runtime.backends import open_session
from compress import core
from compress.sensitivity import apply
from compress.settings import in_order

RUNS = 20  # of a part, of which the fastest counts: other work only ever slows one down
Call = tuple[Any, ...]  # the arguments of a module


def latency(checkpoint: Checkpoint) -> float:
    """Median milliseconds of the checkpoint's .onnx, waveform to text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        to_onnx(checkpoint, path)
        return 1000 * float(speed_of_noise([path])[0]["latency"])


def add_times(
    checkpoint: Checkpoint, found: dict[str, Any], calibration: core.Calibration | None
) -> dict[str, Any]:
    """A scan with `ms` beside all `bytes`: of the rows, of their settings and of the whole."""
    found = copy.deepcopy(found)
    rows, known = found["layers"], dict[str, float]()
    hop = checkpoint.features.hop_length / checkpoint.features.sample_rate
    heard = calls(checkpoint.model, [row["name"] for row in rows], 1, int(NOISE_SECONDS / hop) + 1)
    examples = calls(checkpoint.model, list(heard), *EXAMPLE)

    def row_ms(model: nn.Module, name: str) -> float:
        module, pairs = model.get_submodule(name), zip(examples[name], heard[name], strict=True)
        return sum(timed(module, example, call, known) for example, call in pairs)

    found["ms"] = latency(checkpoint)
    for row in core.progress(rows):
        row["ms"] = row_ms(checkpoint.model, row["name"])
        for text, option in row["settings"].items():
            steps = in_order({text: [row]})
            changed = apply(copy.deepcopy(checkpoint.model), steps, calibration)
            option["ms"] = row_ms(changed, row["name"])
    return found


@torch.no_grad()
def calls(
    model: ConformerCTC, names: Sequence[str], batch: int, frames: int
) -> dict[str, list[Call]]:
    """What each module is called with, once a turn, where the model hears that many frames.

    Nothing for a convolution that its module reads the weights of: how it is stored is all one to
    the file's speed.
    """
    found: dict[str, list[Call]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args)
        )
        for name in names
    ]
    try:
        features = torch.randn(batch, frames, model.config.n_mels)
        model.eval()(features, torch.full((batch,), frames))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def timed(module: nn.Module, example: Call, call: Call, known: dict[str, float]) -> float:
    """`milliseconds` of a module as exported, from what is `known` of its equals where it can."""
    part = as_exported(module)
    sizes = [tuple(x.shape) for x in call if isinstance(x, Tensor)]
    key = f"{signature(nn.Sequential(part))} {sizes}"
    if key not in known:
        known[key] = milliseconds(part, example, call)
    return known[key]


def milliseconds(part: nn.Module, example: Call, call: Call) -> float:
    """The fastest of several runs of a call in onnxruntime, one thread, traced with an example.

    Time of the processor: on a machine that others use it is what a run would take alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.onnx"
        onnx_ir.save(part_graph(part, example, call), path)
        session = open_session(path, threads=1)
    inputs = {x.name: call[int(x.name[1:])].numpy() for x in session.get_inputs()}
    seconds = []
    for _ in range(RUNS + 1):
        start = time.process_time()
        session.run(None, inputs)
        seconds.append(time.process_time() - start)
    return 1000 * min(seconds)
