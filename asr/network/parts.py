"""What the modules of the model share: masks, precision on a CPU, dropout, turns of a block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def valid_mask(lengths: Tensor, size: int) -> Tensor:
    """(B, size) bool, true where a frame belongs to its utterance."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


def no_cpu_autocast() -> AbstractContextManager[Any]:
    """Leaves autocast on a CPU, where bf16 convolutions and attention products are slow."""
    if torch.is_autocast_enabled("cpu"):
        return torch.autocast("cpu", enabled=False)
    return nullcontext()


def cpu_float(x: Tensor) -> Tensor:
    """float32 on a CPU, unchanged on a GPU."""
    return x.float() if x.device.type == "cpu" else x


class LockedDropout(nn.Module):
    """Dropout with one mask for all frames of an utterance: much cheaper on a CPU, same purpose."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        if not self.training or self.p == 0:
            return x
        keep = torch.empty(x.shape[0], 1, x.shape[2], device=x.device).bernoulli_(1 - self.p)
        return x * (keep / (1 - self.p)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Turns(nn.ModuleList):
    """One module for each turn of a shared block."""


def repeated(module: Callable[[], nn.Module], turns: int) -> nn.Module:
    """The module, or one for each of several turns."""
    return module() if turns == 1 else Turns(module() for _ in range(turns))


def of_turn(module: nn.Module, turn: int) -> nn.Module:
    """The module of that turn; one that serves all turns itself."""
    return module[turn] if isinstance(module, Turns) else module


def several(turns: int, name: str = "norms") -> dict[str, int]:
    """The argument of a module with one norm for each turn; none for a single one."""
    return {name: turns} if turns > 1 else {}
