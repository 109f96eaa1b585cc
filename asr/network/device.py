"""Where and in which precision to compute."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any

import torch


def choose_device(name: str) -> torch.device:
    """'auto' is the GPU if there is one; a GPU without a number is this process's (torchrun's)."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r} is not a device; use cpu, cuda or cuda:N") from None
    if device.type != "cuda":
        return device
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this PyTorch sees no GPU; use --device cpu")
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: no GPU has the number {index}, there are {torch.cuda.device_count()}"
        )
    return torch.device("cuda", index)


def choose_precision(name: str, device: torch.device) -> str:
    """'auto' is bf16 where the hardware multiplies in it, else float32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "float32"
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "float32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 autocast on the device, or none for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
