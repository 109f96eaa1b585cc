"""What it costs to remove units whose reader makes up for them, and how it does.

The Linear W that reads the units has inputs of covariance C, S its inverse. Without the inputs R,
and with the rest refitted to the outputs that were (He et al. 2017, arXiv 1707.06168), the squared
error is W_R (S_RR)^-1 W_R' (*Optimal brain surgeon*: Hassibi & Stork 1993). Weighed by what hangs
on the outputs (`calibration.output_gradients`) it is twice the divergence a frame from the model's
answers, to second order and with layers by themselves (K-FAC), which compares between layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.calibration import Moments

STEPS = 64  # units go a 64th of those left at a time, but at least a multiple
DAMPING = 1e-3  # share of the mean variance added to each
RISE = 1e-6  # by which each step's cost is at least above the one before


def damped(matrix: Tensor) -> Tensor:
    """A covariance (n, n) in float64, made invertible."""
    damping = DAMPING * float(matrix.diagonal().mean()) + 1e-12
    return matrix.double() + damping * torch.eye(len(matrix))


@torch.no_grad()
def costs(weight: Tensor, moments: Moments, gradients: Tensor, width: int, multiple: int) -> Tensor:
    """What removing each unit costs after those that go before it: (units,), ascending as they go.

    Units of `width` inputs each go a multiple at a time (of a wide layer several), those first that
    cost least, and what the rest takes over is counted before the next. The last multiple stays:
    its cost is infinite. weight (out, units * width), gradients (out, out).
    """
    inverse = torch.linalg.inv(damped(moments.covariance))
    w = weight.double().t() @ torch.linalg.cholesky(damped(gradients))  # (units * width, out)
    units = torch.arange(weight.shape[1] // width)
    found = torch.full((len(units),), torch.inf, dtype=torch.float64)
    last = 0.0
    while len(units) > multiple:
        blocks = inverse.view(len(units), width, len(units), width)
        own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (units, width, width)
        rows = w.view(len(units), width, -1)
        single = (torch.linalg.inv(own) * (rows @ rows.mT)).sum((1, 2))
        step = max(len(units) // STEPS // multiple, 1) * multiple
        number = min(len(units) % multiple or step, len(units) - multiple)
        gone = torch.zeros(len(units), dtype=torch.bool)
        gone[single.topk(number, largest=False).indices] = True
        wide = gone.repeat_interleave(width)
        out, left = wide.nonzero().flatten(), (~wide).nonzero().flatten()
        removed, across = w[out], inverse[out]
        corner, across = across[:, out], across[:, left]
        part = torch.linalg.solve(corner, torch.cat([removed, across], dim=1))
        taken, part = part.split([removed.shape[1], len(left)], dim=1)
        last = max(float((removed * taken).sum()) / number, last * (1 + RISE))
        found[units[gone]] = last
        w = w[left].addmm_(across.t(), taken, alpha=-1)
        inverse = inverse[left][:, left].addmm_(across.t(), part, alpha=-1)
        units = units[~gone]
    return found


@torch.no_grad()
def refit(linear: nn.Linear, keep: Tensor, moments: Moments) -> None:
    """Changes the weights of the kept inputs and the bias so that they make up for the others.

    Least squares of the outputs that were; keep (kept,) are positions among the inputs.
    """
    covariance = damped(moments.covariance)
    weight = linear.weight.double()
    fitted = weight @ torch.linalg.solve(covariance[keep][:, keep], covariance[keep]).t()
    lost = weight @ moments.mean.double() - fitted @ moments.mean[keep].double()
    linear.weight[:, keep] = fitted.float()  # (out, kept)
    linear.bias.add_(lost.float())
