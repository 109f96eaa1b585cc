"""The files of a run: log.jsonl and TensorBoard's, model.pt to use, last.pt to go on from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from asr.network.checkpoint import Checkpoint, save_checkpoint
from asr.network.model import ConformerCTC


class RunFolder:
    """Writes below `path`, where this process `writes`; several processes share one folder."""

    def __init__(self, path: Path, checkpoint: Checkpoint, tensorboard: bool, writes: bool) -> None:
        self.path, self.checkpoint = path, checkpoint
        self.tensorboard, self.writes = tensorboard, writes
        self.log: list[dict[str, Any]] = []

    def write_log(self, entry: dict[str, Any]) -> None:
        """One line of log.jsonl, and the same numbers to TensorBoard."""
        if not self.writes:
            return
        self.log.append(entry)
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self.tensorboard:
            if not hasattr(self, "writer"):
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(self.path / "tensorboard"))
            for name, value in entry.items():
                if name not in ("step", "epoch"):
                    self.writer.add_scalar(name, value, entry["step"])
            self.writer.flush()

    def restore_log(self, log: list[dict[str, Any]]) -> None:
        """The log as it was at a state; drops lines of steps that will be taken again."""
        self.log = log
        if self.writes:
            lines = "".join(json.dumps(entry) + "\n" for entry in log)
            (self.path / "log.jsonl").write_text(lines, encoding="utf-8")

    def save_model(self, model: nn.Module, run: dict[str, Any]) -> None:
        """model.pt: the float32 weights as chosen, no optimiser; `run` ends its history."""
        history = [*self.checkpoint.history, run]
        chosen = replace(
            self.checkpoint, model=cast(ConformerCTC, model), history=history, training=None
        )
        save_checkpoint(self.path / "model.pt", chosen)

    def save_state(self, training: dict[str, Any]) -> None:
        """last.pt: everything that resuming needs, the log included."""
        if self.writes:
            state = replace(self.checkpoint, training={**training, "log": self.log})
            save_checkpoint(self.path / "last.pt", state)
