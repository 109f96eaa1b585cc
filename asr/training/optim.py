"""Optimiser, learning-rate schedule and the running average of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn


def make_optimizer(
    model: nn.Module,
    name: str,
    learning_rate: float,
    weight_decay: float,
    front: Collection[nn.Parameter] = (),
    front_rate: float = 1.0,
) -> torch.optim.Optimizer:
    """Fused AdamW (or Adam, without decay); weight decay on matrices only.

    The parameters of `front` learn at `front_rate` times the rate.
    """
    ours = {id(p) for p in front}
    groups: list[dict[str, Any]] = []
    for inside in (False, True) if ours else (False,):
        part = [p for p in model.parameters() if p.requires_grad and (id(p) in ours) == inside]
        decay = weight_decay if name == "adamw" else 0.0
        for matrices in (True, False):
            own = [p for p in part if (p.ndim > 1) == matrices]
            groups.append(
                {"params": own, "weight_decay": decay if matrices else 0.0,
                 "scale": front_rate if inside else 1.0}
            )  # fmt: skip
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-8, fused=True)


def learning_rate_at(
    step: int, progress: float, peak: float, scheduler: str, warmup_steps: int, floor: float = 0.01
) -> float:
    """The learning rate of optimiser step `step` (from 0), `progress` in [0, 1] through the run.

    All rise linearly to `peak` over `warmup_steps`. Then `cosine` falls to floor * peak at the
    end, `noam` falls with 1 / sqrt(step), `constant` stays.
    """
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    if scheduler == "cosine":
        return peak * warmup * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    if scheduler == "noam":
        return peak * min(warmup, math.sqrt(max(1, warmup_steps) / (step + 1)))
    return peak * warmup


class AveragedModel:
    """An exponential moving average of a model's weights and buffers."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves the average towards the model; the window grows with `step` up to the decay."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, values = _floats(self.model), _floats(model)
        torch._foreach_lerp_(averages, values, 1 - decay)


def _floats(model: nn.Module) -> list[Tensor]:
    return [t for t in model.state_dict().values() if t.is_floating_point()]
