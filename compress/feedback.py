"""Rounding a weight one column at a time: what each column loses, the next ones make up for.

GPTQ (Frantar et al. 2022, arXiv 2210.17323); `compress.quantization` and `compress.clustering`
round so where they are given speech.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LARGEST = 4096  # inputs of a layer whose Gram matrix is inverted
BLOCK = 64  # columns that feed their errors back one by one
DAMPING = 0.01  # share of the mean diagonal added to a Gram matrix before it is inverted


def feed_back(weight: Tensor, gram: Tensor, nearest: Callable[[int, Tensor], Tensor]) -> None:
    """Rounds a weight (out, in) column by column, each one's error passed on to those after it.

    `nearest(j, column)` takes what column j has
    become by then (out,) and returns what it is rounded to.
    """
    damping = DAMPING * gram.diagonal().mean() + 1e-12
    inverse = torch.cholesky_inverse(
        torch.linalg.cholesky(gram.double() + torch.eye(len(gram)) * damping)
    )
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    w = weight.clone()
    columns = weight.shape[1]
    for start in range(0, columns, BLOCK):  # those beyond a block get its errors all at once
        end = min(start + BLOCK, columns)
        errors = torch.empty(len(w), end - start)
        for j in range(start, end):
            error = (w[:, j] - nearest(j, w[:, j])) / upper[j, j]
            w[:, j + 1 : end] -= torch.outer(error, upper[j, j + 1 : end])
            errors[:, j - start] = error
        w[:, end:] -= errors @ upper[start:end, end:]
