"""Quantisation-aware training: a Linear that computes with the weights it would be stored with.

Rounding passes gradients straight through (Bengio et al. 2013, arXiv 1308.3432); scales are learned
as in LSQ (Esser et al. 2020, arXiv 1902.08153), but as factors of those they began with, which
suits the steps of Adam. The same weights may be trained at several precisions, a random one for
each layer and call (arXiv 2505.21245). `quantization.freeze` turns the layer into the stored one
with the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.network.onnx_layers import dynamic_quantize
from compress.quantization import rounding

INSIDE = 0.49  # how far from its integer a weight begins at most, where it is to be rounded to it
OWN = 0.5  # share of the calls at the layer's own precision, where there are others


def straight_through(value: Tensor, of: Tensor) -> Tensor:
    """The value, with the gradient of `of`."""
    return of + (value - of).detach()


def fake_dynamic_quantize(x: Tensor) -> Tensor:
    """x as `dynamic_quantize` represents it, differentiable."""
    with torch.no_grad():
        values, scale, zero_point = dynamic_quantize(x.float())
        value = (values.float() - zero_point.float()) * scale
    return straight_through(value.to(x.dtype), x)


class Grid(nn.Module):
    """The values that weights (out, in) may take at one precision.

    gain (out * groups,) is trained; scale (out, groups) times gain is the scale.
    """

    scale: Tensor
    zero_point: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, precision: str, group_size: int, asymmetric: bool
    ) -> None:
        super().__init__()
        self.group_size = group_size
        self.low, self.high = rounding.limits(precision, asymmetric)
        groups = -(-in_features // group_size)
        self.gain = nn.Parameter(torch.empty(out_features * groups))
        self.register_buffer("scale", torch.empty(out_features, groups))
        zero_point = torch.empty(out_features, groups) if asymmetric else None
        self.register_buffer("zero_point", zero_point)

    def begin(self, values: rounding.Quantized) -> None:
        """Takes over scales and zero points."""
        self.gain = nn.Parameter(torch.ones_like(values.scale).flatten())
        self.scale, self.zero_point = values.scale, values.zero_point

    def within(self, weight: Tensor, qweight: Tensor) -> Tensor:
        """The weight, moved as little as makes it round to these integers."""
        columns, zero = self.columns(self.scale, weight)
        q = qweight.to(weight.dtype)
        x = weight / columns + zero
        least = torch.where(q == self.low, -torch.inf, q - INSIDE)
        greatest = torch.where(q == self.high, torch.inf, q + INSIDE)
        moved = (x.clamp(least, greatest) - zero) * columns
        return torch.where(x.round().clamp(self.low, self.high) == q, weight, moved)

    def columns(self, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every weight (out, in)."""
        columns = rounding.to_columns(scale, self.group_size, weight.shape[1])
        if self.zero_point is None:
            return columns, torch.zeros_like(columns)
        return columns, rounding.to_columns(self.zero_point, self.group_size, weight.shape[1])

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> rounding.Quantized:
        """What would be stored now."""
        scale = rounding.storable(self.scale * self.gain.view_as(self.scale))
        q = rounding.to_integers(
            weight, scale, self.zero_point, self.group_size, self.low, self.high
        )
        return rounding.Quantized(q.to(torch.int8), scale, self.zero_point)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight (out, in) as stored, differentiable in it and in `gain`."""
        scale = self.scale * self.gain.view_as(self.scale)
        scale = straight_through(rounding.storable(scale.detach()), scale)
        columns, zero = self.columns(scale, weight)
        x = (weight / columns + zero).clamp(self.low, self.high)
        return (straight_through(x.round(), x) - zero) * columns


class FakeQuantLinear(nn.Module):
    """y = x @ Q(weight).T + bias, Q rounding to the precision's integers by learned scales.

    weight (out, in) is trained, and the gains of `grids`: the first is of the precision that will
    be stored, the others of those in `also`, which in training take their turns. int8 quantises x
    as at run time.
    """

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, precision: str, group_size: int,
        bias: bool = True, asymmetric: bool = False, also: Sequence[str] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.args = {
            "in_features": in_features, "out_features": out_features, "precision": precision,
            "group_size": group_size, "bias": bias, "asymmetric": asymmetric, "also": list(also),
        }  # fmt: skip
        self.precision, self.group_size = precision, group_size
        kinds = [(precision, group_size, asymmetric)]
        kinds += [rounding.standard(other, in_features) for other in also]
        self.grids = nn.ModuleList(Grid(in_features, out_features, *kind) for kind in kinds)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    @property
    def one_at_a_time(self) -> bool:
        """Batch mates and padding change the scale of int8 activations."""
        return self.precision == "int8"

    @classmethod
    def from_values(
        cls, linear: nn.Linear, values: rounding.Quantized, precision: str, group_size: int,
        also: Sequence[str] = (),
    ) -> FakeQuantLinear:  # fmt: skip
        """Trains the weights of `linear`, beginning with the integers and scales of `values`."""
        layer = cls(
            linear.in_features, linear.out_features, precision, group_size,
            linear.bias is not None, values.zero_point is not None, also,
        )  # fmt: skip
        weight = linear.weight.detach()
        own = layer.own
        own.begin(values)
        for other, name in zip(list(layer.grids)[1:], also, strict=True):
            kind = rounding.standard(name, linear.in_features)
            cast(Grid, other).begin(rounding.grouped(weight, *kind))
        layer.weight = nn.Parameter(own.within(weight, values.qweight))
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone())
        return layer

    @property
    def own(self) -> Grid:
        """The grid of what will be stored."""
        return cast(Grid, self.grids[0])

    def quantized(self) -> rounding.Quantized:
        """What would be stored now."""
        return self.own.quantized(self.weight)

    def quantized_weight(self) -> Tensor:
        """The weight (out, in) as stored, or in training perhaps at another precision."""
        others = len(self.grids) - 1
        turn = 0
        if self.training and others and torch.rand(()) >= OWN:
            turn = 1 + int(torch.randint(others, ()))
        weight: Tensor = self.grids[turn](self.weight)
        return weight

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if self.precision == "int8":
            x = fake_dynamic_quantize(x)
        bias = None
        if self.bias is not None:
            bias = straight_through(self.bias.detach().to(torch.float16).float(), self.bias)
        return F.linear(x, self.quantized_weight(), bias)

    def extra_repr(self) -> str:
        a = self.args
        return f"{a['in_features']}, {a['out_features']}, {self.precision} in training"
