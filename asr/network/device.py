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
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(
            f"--device {name}: not supported (PyTorch has a CTC loss for cpu and cuda only); "
            "use --device cpu"
        )
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
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if fast else "float32"
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "float32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 autocast on the device, or none for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def memory_trouble(error: RuntimeError) -> str:
    """What to do where memory ran out, in one line; empty for an error of another kind."""
    text = str(error)
    if "DataLoader worker" in text or "shared memory" in text:
        return (
            "a process that reads audio has ended, perhaps for lack of memory: --num_workers 0 "
            "needs less (in a container, --shm-size 2g); --resume goes on from here"
        )
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text:
        return (
            "out of memory: try a smaller --batch_seconds (--accumulate keeps the steps as large); "
            "--resume goes on from here"
        )
    return ""
