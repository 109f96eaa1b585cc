"""Quantisation-aware training: a Linear that computes with the weights it would be stored with.

Rounding passes gradients straight through (Bengio et al. 2013, arXiv 1308.3432); scales are learned
as in LSQ (Esser et al. 2020, arXiv 1902.08153), but as factors of those they began with, which
suits the steps of Adam. `quantization.freeze` turns the layer into the stored one with the same
weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.network.onnx_layers import dynamic_quantize
from compress.quantization import rounding


def straight_through(value: Tensor, of: Tensor) -> Tensor:
    """The value, with the gradient of `of`."""
    return of + (value - of).detach()


def fake_dynamic_quantize(x: Tensor) -> Tensor:
    """x as `dynamic_quantize` represents it, differentiable."""
    with torch.no_grad():
        values, scale, zero_point = dynamic_quantize(x.float())
        value = (values.float() - zero_point.float()) * scale
    return straight_through(value.to(x.dtype), x)


class FakeQuantLinear(nn.Module):
    """y = x @ Q(weight).T + bias, Q rounding to the precision's integers by learned scales.

    weight (out, in) and gain (out * groups,) are trained, scale (out, groups) times gain is the
    scale; int8 quantises x as at run time.
    """

    scale: Tensor
    zero_point: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, precision: str, group_size: int,
        bias: bool = True, asymmetric: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.args = {
            "in_features": in_features, "out_features": out_features, "precision": precision,
            "group_size": group_size, "bias": bias, "asymmetric": asymmetric,
        }  # fmt: skip
        self.precision, self.group_size = precision, group_size
        self.low, self.high = rounding.limits(precision, asymmetric)
        groups = -(-in_features // group_size)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.gain = nn.Parameter(torch.empty(out_features * groups))
        self.register_buffer("scale", torch.empty(out_features, groups))
        zero_point = torch.empty(out_features, groups) if asymmetric else None
        self.register_buffer("zero_point", zero_point)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    @property
    def one_at_a_time(self) -> bool:
        """Batch mates and padding change the scale of int8 activations."""
        return self.precision == "int8"

    @classmethod
    def from_values(
        cls, linear: nn.Linear, values: rounding.Quantized, precision: str, group_size: int
    ) -> FakeQuantLinear:
        """Trains the weights of `linear`, beginning with the scales of `values`."""
        layer = cls(
            linear.in_features, linear.out_features, precision, group_size,
            linear.bias is not None, values.zero_point is not None,
        )  # fmt: skip
        layer.weight = nn.Parameter(linear.weight.detach().clone())
        layer.gain = nn.Parameter(torch.ones_like(values.scale).flatten())
        layer.scale, layer.zero_point = values.scale, values.zero_point
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone())
        return layer

    def quantized(self) -> rounding.Quantized:
        """What would be stored now."""
        with torch.no_grad():
            scale = rounding.storable(self.scale * self.gain.view_as(self.scale))
            q = rounding.to_integers(
                self.weight, scale, self.zero_point, self.group_size, self.low, self.high
            )
        return rounding.Quantized(q.to(torch.int8), scale, self.zero_point)

    def quantized_weight(self) -> Tensor:
        """The weight (out, in) as stored, differentiable in `weight` and `gain`."""
        scale = self.scale * self.gain.view_as(self.scale)
        scale = straight_through(rounding.storable(scale.detach()), scale)
        columns = rounding.to_columns(scale, self.group_size, self.weight.shape[1])
        zero = torch.zeros_like(columns)
        if self.zero_point is not None:
            zero = rounding.to_columns(self.zero_point, self.group_size, self.weight.shape[1])
        x = (self.weight / columns + zero).clamp(self.low, self.high)
        return (straight_through(x.round(), x) - zero) * columns

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
