"""Another network teaches: what it makes of the clean recording, the student is to make of its own.

A teacher gives one vector a frame (hidden values or posteriors, of whatever tokens and rate). At a
block of the student a Linear of its own, which no checkpoint holds, is to give the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.network.model import ConformerBlock, Output
from asr.network.parts import valid_mask
from asr.runtime.config import FeatureConfig
from asr.runtime.features import log_mel
from asr.training.data import Batch
from asr.training.learner import Learner

Array = npt.NDArray[np.float32]


class Teacher:
    """A waveform (N,) to one vector a frame (T, D).

    `name` is an .onnx file whose input is a waveform (1, N), or features as NeMo's and ours, or
    MODULE:FUNCTION, which is given the waveform. `output` names the file's output if it has many.
    """

    def __init__(self, name: str, output: str, features: FeatureConfig) -> None:
        self.features = features
        if name.endswith(".onnx"):
            self.hear = self._open(name, output)
        else:
            self.hear = find_function(name)
        silence = np.zeros(features.sample_rate, np.float32)
        self.width = self(silence).shape[1]

    def __call__(self, waveform: Array) -> Array:
        vectors = np.asarray(self.hear(waveform), dtype=np.float32)
        if vectors.ndim == 3 and len(vectors) == 1:
            vectors = vectors[0]
        if vectors.ndim != 2:
            raise ValueError(f"the teacher gives {vectors.shape}; needed is one vector a frame")
        return vectors

    def _open(self, path: str, output: str) -> Callable[[Array], Any]:
        import onnxruntime

        if not Path(path).is_file():
            raise ValueError(f"{path}: no such teacher")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options)
        names = [x.name for x in session.get_outputs()]
        if output and output not in names:
            raise ValueError(f"{path}: no output {output!r}; there are {', '.join(names)}")
        inputs = {x.name for x in session.get_inputs()}
        wanted = [output or names[0]]

        def by_features(waveform: Array) -> Any:
            mel = log_mel(waveform, self.features).T[None]
            lengths = np.array([mel.shape[2]], np.int64)
            return session.run(wanted, {"audio_signal": mel, "length": lengths})[0]

        def by_waveform(waveform: Array) -> Any:
            return session.run(wanted, {session.get_inputs()[0].name: waveform[None]})[0]

        return by_features if inputs == {"audio_signal", "length"} else by_waveform


def find_function(name: str) -> Callable[[Array], Any]:
    """MODULE:FUNCTION, imported."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--teacher {name}: neither .onnx nor MODULE:FUNCTION ({error})") from None
    return found


class Taught:
    """An objective that adds `weight` times the squared distance from the teacher's vectors."""

    def __init__(self, learner: Learner, width: int, block: int, weight: float) -> None:
        self.plain, self.weight = learner.objective, weight
        student = learner.model.blocks[block - 1]
        assert isinstance(student, ConformerBlock)
        self.head = nn.Linear(int(student.ff1.args["d_model"]), width).to(learner.device)
        learner.add_helper(self.head)
        student.register_forward_hook(self.keep)
        self.hidden = torch.zeros(0)

    def keep(self, block: nn.Module, given: Any, made: Tensor) -> None:
        self.hidden = made

    def __call__(self, output: Output, batch: Batch, features: Tensor, lengths: Tensor) -> Tensor:
        assert batch.hints is not None
        got = self.head(self.hidden.float())  # (B, T', D)
        total = self.plain(output, batch, features, lengths)
        for own, hints, n in zip(
            got, batch.hints, self.frames(got, features, lengths), strict=True
        ):
            wanted = F.interpolate(hints.T[None].to(own.device), n, mode="linear")[0].T
            total = total + self.weight * (own[:n] - wanted).square().mean(dim=1).sum()
        return total

    @staticmethod
    def frames(got: Tensor, features: Tensor, lengths: Tensor) -> list[int]:
        """How many frames of the block belong to each utterance."""
        rate = round(features.shape[1] / got.shape[1])
        mask = valid_mask((lengths + rate - 1) // rate, got.shape[1])
        return [int(n) for n in mask.sum(dim=1)]
