"""Distillation (Hinton et al. 2015, arXiv 1503.02531) of a Conformer-CTC into a smaller one.

The model that is given makes the student and, unless `teacher` names others, teaches it. What is
learnt from: transcripts (CTC), the teacher's distribution over tokens in every frame, on request
its blocks' outputs; of speech without transcripts the teacher's answers alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from asr.network.checkpoint import Checkpoint
from asr.network.model import ConformerCTC
from asr.runtime.config import PRESETS
from compress import core, finetuning
from compress.distillation import training
from compress.distillation.student import build_student, student_config
from compress.distillation.teacher import load_teachers
from compress.imitation import BLANKS

TUNING: dict[str, Any] = {"fine_tune_epochs": 20}  # in place of fine-tuning's own defaults
WITHOUT = ("distill_weight", "fine_tune_seed")  # alpha and seed say it


@dataclass(frozen=True)
class Config:
    """Options of distillation; a size that is not given is the teacher's."""

    preset: str = field(
        default="", metadata={"help": "sizes of the student's blocks", "choices": tuple(PRESETS)}
    )
    n_layers: int = field(default=0, metadata={"help": "depth of the student", "above": 0})
    d_model: int = field(default=0, metadata={"help": "width of the student", "above": 0})
    n_heads: int = field(default=0, metadata={"help": "heads of its attention", "above": 0})
    ff_expansion: int = field(
        default=0, metadata={"help": "how many times wider its feed-forward is", "above": 0}
    )
    share_layers: int = field(
        default=0, metadata={"help": "blocks stored, used in turn at every depth", "above": 0}
    )
    own_norms: bool = field(
        default=False, metadata={"help": "shared blocks have LayerNorms for each depth"}
    )
    initial: str = field(
        default="teacher",
        metadata={"help": "the student's first weights", "choices": ("teacher", "random")},
    )
    seed: int = field(default=0, metadata={"help": "of random weights, and as fine_tune_seed"})
    temperature: float = field(default=1.0, metadata={"help": "softens both distributions, 1 to 8"})
    alpha: float = field(
        default=0.3, metadata={"help": "share of the transcripts in the loss, 0 to 1"}
    )
    blanks: str = field(
        default="plain",
        metadata={
            "help": "frames all alike, weighted by what the teacher says beside blank, or compared "
            "without blank",
            "choices": BLANKS,
        },
    )
    teacher: str = field(
        default="",
        metadata={"help": "other teachers, .pt or .onnx, with commas between: their mean"},
    )
    unlabelled: str = field(
        default="",
        metadata={"help": "folder or manifest of speech, learnt from as well without transcripts"},
    )
    cache: str = field(
        default="",
        metadata={
            "help": "folder for the teacher's answers, asked for once; then speed is not perturbed"
        },
    )
    cache_tokens: int = field(
        default=8, metadata={"help": "likeliest tokens of a frame that the cache keeps"}
    )

    def __post_init__(self) -> None:
        if not 1 <= self.temperature <= 8:
            raise ValueError(f"temperature {self.temperature} must lie in [1, 8]")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha {self.alpha} must lie in [0, 1]")
        if self.cache_tokens < 1:
            raise ValueError(f"cache_tokens {self.cache_tokens} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} must not be negative")
        for name, allowed in (
            ("preset", ("", *PRESETS)), ("initial", ("teacher", "random")), ("blanks", BLANKS),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                known = ", ".join(filter(None, allowed))
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {known}")

    @property
    def sizes(self) -> dict[str, Any]:
        names = ("n_layers", "d_model", "n_heads", "ff_expansion", "share_layers", "own_norms")
        return {name: getattr(self, name) for name in names}


def apply(
    model: nn.Module, config: Config, calibration: core.Calibration | None = None
) -> nn.Module:
    """The student before it has learnt anything."""
    teacher = cast(ConformerCTC, model)
    replaced = [name for name, module in model.named_modules() if core.is_packed(module)]
    if replaced:
        raise ValueError(
            f"{replaced[0]} is a packed layer: distillation comes before clustering and "
            "quantization; make the student from the float checkpoint, and name this --teacher"
        )
    torch.manual_seed(config.seed)
    return build_student(
        teacher, student_config(teacher.config, config.preset, config.sizes), config.initial
    )


def check(checkpoint: Checkpoint, config: Config, tuning: finetuning.Options) -> None:
    """Raises ValueError, before anything is trained, where teachers or speech will not do."""
    if not tuning.fine_tune_epochs:
        return
    teachers = load_teachers(config.teacher, checkpoint)
    if tuning.hint_weight and (len(teachers) > 1 or not isinstance(teachers[0].source, nn.Module)):
        raise ValueError("hint_weight needs one teacher, a .pt: its blocks are looked into")
    if config.alpha == 1 and config.unlabelled:
        raise ValueError("alpha 1 learns from transcripts alone: leave --unlabelled out")
    if config.unlabelled:
        training.unlabelled(config.unlabelled, math.inf)


def train(
    checkpoint: Checkpoint, teacher: Checkpoint, config: Config, tuning: finetuning.Options,
    folder: Path | None,
) -> nn.Module:  # fmt: skip
    """Trains the student `checkpoint.model`; the arguments are those of `finetuning.fine_tune`."""
    teachers = load_teachers(config.teacher, teacher)
    return finetuning.fine_tune(
        checkpoint, teacher.model, tuning, folder,
        run=training.Run(config, teachers),
    )  # fmt: skip


def why_kept(model: nn.Module, name: str, config: Config) -> str:
    """Why a layer is as large as it was."""
    return "a layer of the student; distillation chooses shapes, not how they are stored"
