"""The processes that torchrun starts: the group they form, and work that they share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from asr.network.device import choose_device

T = TypeVar("T")
Item = TypeVar("Item")

# How long one waits for another, which may be writing a file or measuring alone meanwhile. Where
# one ends with an error, torchrun ends all at once.
PATIENCE = timedelta(hours=12)


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Inside, the processes that torchrun started work together; without it, one alone."""
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if distributed:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        if distributed:
            dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is the process that speaks and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(items: Sequence[Item], work: Callable[[Sequence[Item]], list[T]]) -> list[T]:
    """`work` on all items, each process doing its share; each gets all results, in order."""
    if not dist.is_initialized():
        return work(items)
    rank, world = dist.get_rank(), dist.get_world_size()
    parts: list[list[T]] = [[] for _ in range(world)]
    dist.all_gather_object(parts, work(items[rank::world]))
    return [parts[i % world][i // world] for i in range(len(items))]


def take_buffers_of_first(model: nn.Module) -> None:
    """Gives every process the first one's batch statistics, which each has measured alone."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
