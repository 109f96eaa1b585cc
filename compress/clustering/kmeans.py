"""K-means in one dimension, exact in its steps: sorted values make each of them a few look-ups.

Clusters are intervals of the sorted values, so their means are differences of cumulative sums. The
start puts centroids as densely as the cube root of the density, the optimum for many centroids
(Panter & Dite 1951); Lloyd's iterations (1982) do the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 500
TOLERANCE = 1e-4  # of the mean distance of centroids: stop when none moves further


def kmeans(values: Tensor, k: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codebook (k,) of fp16 values, ascending, and the nearest entry of each value, uint8.

    Minimises the sum of importance * (value - centroid)**2. Exact zeros get a centroid of exactly
    0. At most k different values are kept as they are (in fp16).
    """
    flat = values.flatten()
    weight = torch.ones_like(flat) if importance is None else importance.flatten()
    present = flat != 0
    zeros = not bool(present.all())
    centroids = _lloyd(flat[present], weight[present], k - zeros)
    if zeros:
        centroids = torch.cat((centroids, centroids.new_zeros(1)))
    codebook = centroids.to(torch.float16).to(torch.float32).sort().values
    codebook = torch.cat((codebook, codebook[-1:].expand(k - len(codebook))))
    middles = (codebook[1:] + codebook[:-1]) / 2
    return codebook, torch.bucketize(values, middles).to(torch.uint8)


def _lloyd(values: Tensor, weight: Tensor, k: int) -> Tensor:
    """At most k centroids (float64) of non-zero values."""
    if k == 0 or not len(values):
        return values.new_zeros(0, dtype=torch.float64)
    values, order = values.sort()
    distinct: Tensor = torch.unique_consecutive(values)
    if len(distinct) <= k:
        return distinct.to(torch.float64)
    x, h = values.double() - values.mean(), weight[order].double().clamp(min=1e-30)
    sums = [torch.cat((x.new_zeros(1), t.cumsum(0))) for t in (h, h * x, h * x * x)]
    centroids = _first_centroids(x, h, k)
    tolerance = TOLERANCE * (x[-1] - x[0]) / k
    for _ in range(ITERATIONS):
        middles = (centroids[1:] + centroids[:-1]) / 2
        bounds = torch.searchsorted(x, middles)
        ends = torch.cat((bounds.new_zeros(1), bounds, bounds.new_full((1,), len(x))))
        mass, moment, square = (t[ends].diff() for t in sums)
        empty = ends.diff() == 0
        new = torch.where(empty, centroids, moment / mass)
        if empty.any():  # halve the clusters of largest error instead
            error = (square - new * moment).masked_fill(empty, 0)
            worst = error.topk(int(empty.sum())).indices
            new[empty] = (new[worst] + x[ends[worst]]) / 2
            new = new.sort().values
        moved = (new - centroids).abs().max()
        centroids = new
        if moved <= tolerance:
            break
    return centroids + values.mean()


def _first_centroids(x: Tensor, h: Tensor, k: int) -> Tensor:
    """k ascending points, as dense as the cube root of the density of the sorted values.

    Between neighbours at distance d the density is about h / d, so their share is h^1/3 d^2/3.
    """
    share = ((h[1:] + h[:-1]) / 2).pow(1 / 3) * x.diff().pow(2 / 3)
    share = torch.cat((x.new_zeros(1), share.cumsum(0)))
    wanted = (torch.arange(k, dtype=x.dtype) + 0.5) / k * share[-1]
    right = torch.searchsorted(share, wanted).clamp(1, len(x) - 1)
    part = (wanted - share[right - 1]) / (share[right] - share[right - 1])
    return x[right - 1] + part * (x[right] - x[right - 1])
