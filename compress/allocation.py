"""Which of its options each layer gets, so that all together fit a budget at the least loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import nn

Array = npt.NDArray[np.float64]
PER_TENSOR = 330  # bytes that the file of a plain model spends on naming a tensor


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, as they are in memory."""
    return sum(t.nbytes for t in model.state_dict().values())


def file_bytes(model: nn.Module) -> int:
    """Bytes of the file of a plain float32 model, to about 0.1 %."""
    return tensor_bytes(model) + PER_TENSOR * len(model.state_dict())


def allocate(sizes: Sequence[Array], losses: Sequence[Array], budget: float) -> list[int]:
    """The option of each layer, for the least sum of losses with a sum of sizes <= budget.

    `sizes[i][j]` and `losses[i][j]` belong to option j of layer i. Lagrange's relaxation (Everett
    1963): every layer minimises loss + price * size at one common price, the lowest that fits; what
    is left is spent on the layers where it helps most. Raises ValueError if nothing fits.
    """
    smallest = sum(s.min() for s in sizes)
    if smallest > budget:
        raise ValueError(f"not below {smallest:.0f} by these options, but {budget:.0f} is asked")

    def at(price: float) -> list[int]:
        return [_least(loss + price * size, size) for size, loss in zip(sizes, losses, strict=True)]

    def total(choice: list[int]) -> float:
        return float(sum(size[j] for size, j in zip(sizes, choice, strict=True)))

    low, high = -40.0, 40.0  # logarithms of the price
    choice = [int(size.argmin()) for size in sizes]
    for _ in range(60):
        middle = (low + high) / 2
        tried = at(math.exp(middle))
        if total(tried) <= budget:
            choice, high = tried, middle
        else:
            low = middle
    return _spend(sizes, losses, choice, budget - total(choice))


def _least(cost: Array, size: Array) -> int:
    """The cheapest option, the smallest of equally cheap ones."""
    return int(np.lexsort((size, cost))[0])


def _spend(
    sizes: Sequence[Array], losses: Sequence[Array], choice: list[int], left: float
) -> list[int]:
    """Larger options while they fit, each time the one that lowers the loss most."""
    choice = list(choice)
    while True:
        best, gain = (0, 0), 0.0
        for i, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
            now = choice[i]
            gains = np.where(size - size[now] <= left, loss[now] - loss, 0.0)
            j = int(gains.argmax())
            if gains[j] > gain:
                best, gain = (i, j), float(gains[j])
        if gain <= 0:
            return choice
        i, j = best
        left -= float(sizes[i][j] - sizes[i][choice[i]])
        choice[i] = j
