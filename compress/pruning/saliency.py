"""Zeros that speech can bear: which weights cost least, and the rest takes over for them.

Setting a weight w_ij to zero costs w_ij^2 C_jj G_ii: C is the covariance of the layer's inputs and
G what hangs on its outputs (`calibration.output_gradients`). That is the diagonal of Fisher's
information (LeCun et al. 1989, *Optimal brain damage*) in the factors of K-FAC (arXiv 1503.05671),
and compares between layers. The weights that stay are fitted to what the layer gave before, as in
SparseGPT (arXiv 2301.00774) but all at once, by conjugate gradients; the bias takes over the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from compress.calibration import Moments, input_moments, output_gradients
from compress.core import Calibration, progress
from compress.feedback import LARGEST

ROUNDS = 3  # in which the share of zeros grows along a cubic schedule
ITERATIONS = 5  # of conjugate gradients in each
DAMPING = 1e-2  # share of the mean variance added to each


def prune(
    model: nn.Module, chosen: Sequence[tuple[str, nn.Linear]], share: float, allocation: str,
    calibration: Calibration,
) -> None:  # fmt: skip
    """Sets that share of the weights of the Linears to zero, of all together or of each layer."""
    names = [name for name, _ in chosen]
    moments = input_moments(model, calibration, names)
    gradients = output_gradients(model, calibration, names, diagonal=True)
    means = {name: moment.mean for name, moment in moments.items()}
    grams = {name: damped(moments.pop(name), layer.bias is not None) for name, layer in chosen}
    weights = {name: layer.weight.detach() for name, layer in chosen}
    before = {name: weight.clone() for name, weight in weights.items()}
    for number in progress(range(1, ROUNDS + 1), "rounds"):
        part = share * (1 - (1 - number / ROUNDS) ** 3)
        costs = {
            name: weight.square() * grams[name].diagonal() * gradients[name].unsqueeze(1)
            for name, weight in weights.items()
        }
        most = threshold(torch.cat([cost.flatten() for cost in costs.values()]), part)
        for name, weight in weights.items():
            cost = costs.pop(name)
            mask = cost > (most if allocation == "global" else threshold(cost, part))
            weight.mul_(mask)
            if weight.shape[1] <= LARGEST:
                weight.copy_(refit(before[name], weight, grams[name], mask))
    for name, layer in chosen:
        if layer.bias is not None:
            layer.bias.detach().add_((before[name] - weights[name]) @ means[name])


def damped(moments: Moments, centred: bool) -> Tensor:
    """What the errors of the weights of an input cost, (in, in): the mean costs nothing if a bias
    can take it over."""
    gram = moments.covariance if centred else moments.gram
    diagonal = gram.diagonal()
    diagonal += DAMPING * diagonal.mean() + 1e-12
    return gram


def threshold(values: Tensor, share: float) -> float:
    """The largest of that share of the values, the least of them; -1 for none."""
    count = round(share * values.numel())
    ordered = np.partition(values.flatten().cpu().numpy(), max(count - 1, 0))
    return float(ordered[count - 1]) if count else -1.0


def refit(target: Tensor, start: Tensor, gram: Tensor, mask: Tensor) -> Tensor:
    """Weights (out, in) nearer to `target` in the sense of `gram` (in, in), zero outside the mask.

    Every row has a problem of its own: conjugate gradients with the diagonal for preconditioner.
    """
    weights = start
    residual = ((target - weights) @ gram) * mask
    step = residual / gram.diagonal()
    size = (residual * step).sum(1, keepdim=True)
    for _ in range(ITERATIONS):
        curved = (step @ gram) * mask
        length = size / (step * curved).sum(1, keepdim=True).clamp(min=1e-30)
        weights = weights + length * step
        residual = residual - length * curved
        scaled = residual / gram.diagonal()
        before, size = size, (residual * scaled).sum(1, keepdim=True)
        step = scaled + step * (size / before.clamp(min=1e-30))
    return weights
