"""Which integers and scales stand for a weight: the values behind the layers.

A weight (out, in) is cut into groups along the input; a group w becomes (q - zero_point) * scale
with q in the limits of the precision. Scales are fp16 values, and every q is chosen for the rounded
scale, so what is computed is what is stored. Exact zeros stay exact zeros.

Of int2 a zero point is 0 or -1/2: four values -2 ... 1 or -1.5 ... 1.5 times a scale of either
sign, whichever suits the group. Without a zero among them four values waste none on weights that
are few (Liu et al. 2025, arXiv 2502.02631).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compress import feedback

LIMITS = {"int8": (-127, 127), "int4": (-8, 7), "int2": (-2, 1), "ternary": (-1, 1)}
GROUP_SIZES = {  # default first
    "int4": (32, 16, 64, 128, 256),
    "int2": (32, 16, 64, 128, 256),
    "ternary": (64, 128, 256, 512),
}
ZERO_STEP = {"int8": 1.0, "int4": 1.0, "int2": 0.5}  # zero points are multiples of it
SHRINK = torch.linspace(0.65, 1.1, 10).tolist()  # clipping tried by the search, 1 = none
CENTRED = -0.5  # the zero point of int2 that has as many values on either side
SHRINK_INT2 = torch.linspace(0.35, 1.1, 16).tolist()


class Quantized(NamedTuple):
    """qweight (out, in) int8, scale and zero_point (out, groups) float32."""

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None


def standard(precision: str, in_features: int) -> tuple[str, int, bool]:
    """The precision, its usual group size (int8: the whole row) and whether it has zero points."""
    return precision, GROUP_SIZES.get(precision, (in_features,))[0], precision == "int2"


def limits(precision: str, asymmetric: bool) -> tuple[int, int]:
    """Least and greatest integer; a symmetric int8 leaves out -128."""
    return (-128, 127) if precision == "int8" and asymmetric else LIMITS[precision]


def grouped(
    weight: Tensor, precision: str, group_size: int, asymmetric: bool = False,
    importance: Tensor | None = None,
) -> Quantized:  # fmt: skip
    """Quantises a weight; `importance` (in,) weighs the squared errors of the columns.

    int8 takes the largest magnitude of a group as its limit, int4 and int2 search for the scale of
    least squared error, ternary computes it. int2 is asymmetric in any case.
    """
    w = to_groups(weight, group_size)  # (out, groups, group_size)
    h = torch.ones_like(w[:1]) if importance is None else to_groups(importance[None], group_size)
    low, high = limits(precision, asymmetric)
    zero_point = None
    if precision == "int2":
        scale, zero_point = _int2_scale(w, h, low, high)
    elif asymmetric:
        scale, zero_point = _asymmetric_scale(w, h, low, high, search=precision != "int8")
    elif precision == "int8":
        scale = w.abs().amax(2) / high
    elif precision == "int4":
        scale, _ = _best_scale(w, h, low, high, SHRINK)
    else:
        scale = _ternary_scale(w, h)
    scale = storable(scale)
    qweight = to_integers(weight, scale, zero_point, group_size, low, high).to(torch.int8)
    return Quantized(qweight, scale, zero_point)


def storable(scale: Tensor) -> Tensor:
    """Scales as fp16 values; those that fp16 would make zero become 1."""
    scale = scale.to(torch.float16).to(torch.float32)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def to_groups(weight: Tensor, group_size: int) -> Tensor:
    """(out, in) -> (out, groups, group_size), the last group filled with zeros."""
    padding = -weight.shape[1] % group_size
    return torch.nn.functional.pad(weight, (0, padding)).view(len(weight), -1, group_size)


def to_columns(values: Tensor, group_size: int, in_features: int) -> Tensor:
    """(out, groups) -> (out, in): each column gets the value of its group."""
    wide = values.unsqueeze(2).expand(-1, -1, group_size).flatten(1)
    return wide[:, :in_features]


def to_integers(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, low: int, high: int
) -> Tensor:
    """The nearest integers (out, in), as floats."""
    columns = weight.shape[1]
    x = weight / to_columns(scale, group_size, columns)
    if zero_point is not None:
        x = x + to_columns(zero_point, group_size, columns)
    return x.round().clamp(low, high)


def dequantize(
    qweight: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int
) -> Tensor:
    """(out, in) float32: (qweight - zero_point) * scale."""
    q = qweight.to(scale.dtype)
    if zero_point is not None:
        q = q - to_columns(zero_point, group_size, q.shape[1])
    return q * to_columns(scale, group_size, q.shape[1])


def _best_scale(
    w: Tensor, h: Tensor, low: int, high: int, shrinks: list[float], zero: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Scales (out, groups) of least squared error among clipped ranges of either sign.

    And by how much the error falls: for the integers of each candidate the best scale is a quotient
    of sums, and the error falls by its numerator squared over its denominator.
    """
    largest = w.gather(2, w.abs().argmax(2, keepdim=True)).squeeze(2)
    best = torch.zeros_like(largest)
    scale = torch.zeros_like(largest)
    for limit in {low - zero, high - zero}:
        for shrink in shrinks:
            step = storable(largest * (shrink / limit)).unsqueeze(2)
            q = (w / step).add_(zero).round_().clamp_(low, high).sub_(zero)
            hq = h * q
            cross, square = (hq * w).sum(2), (hq * q).sum(2).clamp(min=1e-30)
            gain = cross * cross / square
            better = gain > best
            best = torch.where(better, gain, best)
            scale = torch.where(better, cross / square, scale)
    return scale, best


def _int2_scale(w: Tensor, h: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points (out, groups); groups with exact zeros have 0 among their values."""
    scale, gain = _best_scale(w, h, low, high, SHRINK_INT2)
    centred, centred_gain = _best_scale(w, h, low, high, SHRINK_INT2, CENTRED)
    better = (centred_gain > gain) & (w != 0).all(2) & (centred.half() != 0)
    return torch.where(better, centred, scale), CENTRED * better


def _ternary_scale(w: Tensor, h: Tensor) -> Tensor:
    """The best scales (out, groups): the mean of the k largest, for the best of all k."""
    size, order = w.abs().sort(2, descending=True)
    h = h.expand_as(w).gather(2, order)
    cross, square = (h * size).cumsum(2), h.cumsum(2).clamp(min=1e-30)
    k = (cross * cross / square).argmax(2, keepdim=True)
    return (cross / square).gather(2, k).squeeze(2)


def _asymmetric_scale(
    w: Tensor, h: Tensor, low: int, high: int, search: bool
) -> tuple[Tensor, Tensor]:
    """Scales and zero points (out, groups) for ranges that include 0, clipped where that helps."""
    least, greatest = w.amin(2).clamp(max=0), w.amax(2).clamp(min=0)
    best = torch.full_like(least, torch.inf)
    scale, zero_point = torch.ones_like(least), torch.zeros_like(least)
    for shrink in [r for r in SHRINK if r <= 1] if search else [1.0]:
        step = storable((greatest - least) * (shrink / (high - low)))
        zero = (low - least * shrink / step).round().clamp(low, high)
        q = (w / step.unsqueeze(2) + zero.unsqueeze(2)).round().clamp(low, high)
        error = (h * (w - (q - zero.unsqueeze(2)) * step.unsqueeze(2)).square()).sum(2)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero_point = torch.where(better, step, scale), torch.where(better, zero, zero_point)
    return scale, zero_point


def output_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """Mean squared error of the layer's output: trace of D G D', D the difference (out, in)."""
    difference = (weight - approximation).detach()
    return float(((difference @ gram) * difference).sum())


def compensated(
    weight: Tensor, precision: str, group_size: int, asymmetric: bool, gram: Tensor
) -> Quantized:
    """`grouped` for the inputs of Gram matrix (in, in), each column's error passed on to the next.

    The scales are fixed beforehand. Layers of more than `LARGEST` inputs are rounded as `grouped`.
    """
    diagonal = gram.diagonal()
    fixed = grouped(
        weight, precision, group_size, asymmetric, diagonal + feedback.DAMPING * diagonal.mean()
    )
    if len(gram) > feedback.LARGEST:
        return fixed
    low, high = limits(precision, asymmetric)
    scale = to_columns(fixed.scale, group_size, weight.shape[1])
    zero = torch.zeros_like(scale)
    if fixed.zero_point is not None:
        zero = to_columns(fixed.zero_point, group_size, weight.shape[1])
    qweight = torch.empty_like(fixed.qweight)

    def nearest(j: int, column: Tensor) -> Tensor:
        q = (column / scale[:, j] + zero[:, j]).round().clamp(low, high)
        q = torch.where(weight[:, j] == 0, zero[:, j], q)  # pruned weights stay so
        qweight[:, j] = q.to(torch.int8)
        return (q - zero[:, j]) * scale[:, j]

    feedback.feed_back(weight, gram, nearest)
    return Quantized(qweight, fixed.scale, fixed.zero_point)
