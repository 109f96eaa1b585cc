"""Arithmetic that an exported model does for a second of audio, counted on the graph that runs.

Products of matrices and convolutions, two operations for each multiplication and addition, as
torch.utils.flop_counter counts them; norms, activations and softmax are left out. A weight that is
zero is multiplied like any other, a block that runs at eight depths counts eight times, an integer
product as one of floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Shape = tuple[int, ...]
SECONDS = 10.0  # of audio: attention grows with the square of it


def flops_per_second(path: str | Path, seconds: float = SECONDS) -> float:
    """Operations for a second of audio, when a recording of `seconds` is heard at once.

    Raises ValueError for an .onnx file that `asr.load` cannot run.
    """
    from asr.runtime.recognizer import load

    info = load(path).info
    frames = round(seconds * info.features.sample_rate / info.features.hop_length)
    return graph_flops(path, frames, info.features.n_mels) / seconds


def graph_flops(path: str | Path, frames: int, n_mels: int = 80) -> int:
    """Operations for one recording of so many frames (one every 10 ms)."""
    import onnx

    model = onnx.load(str(path))
    counted = [node for node in model.graph.node if node.op_type in COUNTED]
    shapes = run_shapes(model, {name for node in counted for name in (*node.input, *node.output)},
                        frames, n_mels)  # fmt: skip
    return sum(
        2 * COUNTED[node.op_type]([shapes.get(name, ()) for name in node.input],
                                  shapes[node.output[0]], attributes(node))
        for node in counted
    )  # fmt: skip


def run_shapes(model: Any, names: set[str], frames: int, n_mels: int) -> dict[str, Shape]:
    """The shapes that these values have when the model hears silence of that length."""
    import onnx
    import onnxruntime

    shapes: dict[str, Shape] = {x.name: tuple(x.dims) for x in model.graph.initializer}
    made = {name for node in model.graph.node for name in node.output if name}
    wanted = sorted(names & made)
    there = {output.name for output in model.graph.output}
    for name in wanted:
        if name not in there:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    heard: dict[str, npt.NDArray[Any]] = {
        "audio_signal": np.zeros((1, n_mels, frames), np.float32),
        "length": np.array([frames], np.int64),
    }
    values = session.run(wanted, heard)
    shapes |= {name: value.shape for name, value in zip(wanted, values, strict=True)}
    return shapes | {name: value.shape for name, value in heard.items()}


def attributes(node: Any) -> dict[str, int]:
    """The whole numbers among a node's attributes."""
    return {a.name: a.i for a in node.attribute if a.type == 2}


def _matmul(inputs: list[Shape], output: Shape, _: dict[str, int]) -> int:
    return math.prod(output) * inputs[0][-1]


def _gemm(inputs: list[Shape], output: Shape, given: dict[str, int]) -> int:
    return math.prod(output) * inputs[0][0 if given.get("transA") else 1]


def _conv(inputs: list[Shape], output: Shape, _: dict[str, int]) -> int:
    return math.prod(output) * math.prod(inputs[1][1:])  # (out, in / groups, kernel ...)


def _n_bits(_: list[Shape], output: Shape, given: dict[str, int]) -> int:
    return math.prod(output) * given["K"]


COUNTED: dict[str, Callable[[list[Shape], Shape, dict[str, int]], int]] = {
    "MatMul": _matmul, "MatMulInteger": _matmul, "Gemm": _gemm, "Conv": _conv,
    "ConvInteger": _conv, "MatMulNBits": _n_bits,
}  # fmt: skip
