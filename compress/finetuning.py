"""Fine-tuning after (or during) a compression step, with or without distillation.

The seam that `compress.core.run` calls; this file imports nothing from `compress.core`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from asr.checkpoint import Checkpoint


@dataclass(frozen=True)
class Options:
    """Options of fine-tuning; each becomes a flag of compress.py and an option of a recipe step."""

    fine_tune_epochs: int = field(default=0, metadata={"help": "epochs of training afterwards"})
    fine_tune_data: str = field(
        default="", metadata={"help": "data to train on; by default what the model was trained on"}
    )

    def __post_init__(self) -> None:
        if self.fine_tune_epochs < 0:
            raise ValueError(f"fine_tune_epochs {self.fine_tune_epochs} must not be negative")


def fine_tune(
    checkpoint: Checkpoint, teacher: nn.Module, options: Options, folder: Path | None
) -> nn.Module:
    """Trains `checkpoint.model` and returns it in eval mode.

    `teacher` is the model before the first step, in eval mode. `folder` is where an interrupted
    run may leave what it needs to resume. Before each optimiser step every submodule that has a
    method `progress(fraction)` is told how far training is, 0 to 1 (gradual pruning, for example).
    """
    raise ValueError("fine-tuning is not available in this version")
