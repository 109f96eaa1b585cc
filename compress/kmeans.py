"""K-means in one dimension, exact in its steps: sorted values make each of them a few look-ups.

Clusters are intervals of the sorted values, so their means are differences of cumulative sums. The
start puts centroids as densely as the cube root of the density, the optimum for many centroids
(Panter & Dite 1951); Lloyd's iterations (1982) do the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 300
TOLERANCE = 1e-6  # of the range of the values: stop when no centroid moves further
BINS = 2048


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
    x, h = values.double(), weight[order].double().clamp(min=1e-30)
    start = x.new_zeros(1)
    mass, moment = (torch.cat((start, t.cumsum(0))) for t in (h, h * x))
    centroids = _first_centroids(x, h, k)
    for _ in range(ITERATIONS):
        middles = (centroids[1:] + centroids[:-1]) / 2
        bounds = torch.searchsorted(x, middles)
        ends = torch.cat((bounds.new_zeros(1), bounds, bounds.new_full((1,), len(x))))
        in_cluster = mass[ends].diff()
        mean = moment[ends].diff() / in_cluster
        new = torch.where(ends.diff() > 0, mean, centroids)
        moved = (new - centroids).abs().max()
        centroids = new
        if moved <= TOLERANCE * (x[-1] - x[0]):
            break
    return centroids


def _first_centroids(x: Tensor, h: Tensor, k: int) -> Tensor:
    """k ascending points, as dense as the cube root of the density of the sorted values."""
    edges = torch.linspace(float(x[0]), float(x[-1]), BINS + 1, dtype=x.dtype)
    bins = torch.bucketize(x, edges[1:-1])
    density = torch.zeros(BINS, dtype=x.dtype).index_add_(0, bins, h)
    share = torch.cat((x.new_zeros(1), density.pow(1 / 3).cumsum(0)))
    wanted = (torch.arange(k, dtype=x.dtype) + 0.5) / k * share[-1]
    right = torch.searchsorted(share, wanted).clamp(1, BINS)
    part = (wanted - share[right - 1]) / (share[right] - share[right - 1])
    return edges[right - 1] + part * (edges[right] - edges[right - 1])
