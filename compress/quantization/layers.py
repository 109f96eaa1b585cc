"""The layers of quantization: integers in store and, for int8, at work too.

Each is built empty from its `args`; loading fills parameters and buffers. `weight()` is the weight
that a layer stands for, `onnx_layer()` what is exported in its place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.network import onnx_layers
from asr.network.integers import GroupedIntegers, Integers, TernaryIntegers
from asr.network.onnx_layers import dynamic_quantize
from compress import convolution
from compress.core import round_to_half
from compress.quantization import fakequant, rounding


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, in) uint8 times weight (out, in) int8, transposed: exact int32 (N, out)."""
    if x.is_cpu:
        return torch._int_mm(x, weight.t())
    return (x.double() @ weight.t().double()).to(torch.int32)


class QuantLinear(nn.Module):
    """y = x @ W.T + bias, W = (qweight - zero_point) * scale by groups along the input.

    qweight (out, in) int8 of -8..7 (int4), -2..1 (int2) or -1..1 (ternary); scale and zero_point
    (out, groups), the latter in steps of `rounding.ZERO_STEP`; the last group may be shorter.
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, precision: str, group_size: int,
        bias: bool = True, asymmetric: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.args = {
            "in_features": in_features, "out_features": out_features, "precision": precision,
            "group_size": group_size, "bias": bias, "asymmetric": asymmetric,
        }  # fmt: skip
        self.precision, self.group_size, self.in_features = precision, group_size, in_features
        groups = -(-in_features // group_size)
        self.register_buffer("qweight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(out_features, groups))
        zero_point = torch.empty(out_features, groups, dtype=torch.int8) if asymmetric else None
        self.register_buffer("zero_point", zero_point)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    @classmethod
    def from_values(
        cls, values: rounding.Quantized, bias: Tensor | None, precision: str, group_size: int
    ) -> QuantLinear:
        """A layer of these integers and scales; the bias is rounded to fp16."""
        out_features, in_features = values.qweight.shape
        asymmetric = values.zero_point is not None
        layer = cls(in_features, out_features, precision, group_size, bias is not None, asymmetric)
        layer.qweight, layer.scale, zero_point = values
        if zero_point is not None:
            layer.zero_point = (zero_point / rounding.ZERO_STEP[precision]).to(torch.int8)
        layer.bias = half_parameter(bias)
        return layer

    def zeros(self) -> Tensor | None:
        """The zero points (out, groups) as floats; None of a symmetric layer."""
        if self.zero_point is None:
            return None
        return self.zero_point.to(self.scale.dtype) * rounding.ZERO_STEP[self.precision]

    def weight(self) -> Tensor:
        """The dequantised weight (out, in)."""
        return rounding.dequantize(self.qweight, self.scale, self.zeros(), self.group_size)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return F.linear(x, self.weight().to(x.dtype), self.bias)

    def onnx_layer(self, compute: str) -> nn.Module:
        """In integers with a scale an output; in float int4 is onnxruntime's MatMulNBits."""
        middle = -rounding.LIMITS[self.precision][0]
        q, zeros = self.qweight + middle, self.zeros()
        zero_point = None if zeros is None else zeros + middle
        if compute == "int8":
            weight = (
                TernaryIntegers(self.qweight, self.scale, self.group_size)
                if self.precision == "ternary"
                else GroupedIntegers(q, self.scale, self.group_size, middle, zero_point)
            )
            return onnx_layers.Int8Linear(weight, self.bias)
        if self.precision == "int4":
            return onnx_layers.NBitsLinear(q, self.scale, self.bias, zero_point, 4, self.group_size)
        return _FloatGroups(self, q, middle if zero_point is None else zero_point)

    def extra_repr(self) -> str:
        group = f", group {self.group_size}" if self.group_size < self.in_features else ""
        asymmetric = ", asymmetric" if self.args["asymmetric"] else ""
        return (
            f"{self.in_features}, {self.args['out_features']}, {self.precision}{group}{asymmetric}"
        )


class _FloatGroups(nn.Module):
    """A QuantLinear of q (out, in) from 0 and zero points, for export as a float product."""

    q: Tensor
    zero: Tensor
    scale: Tensor

    def __init__(self, layer: QuantLinear, q: Tensor, zero: Tensor | int) -> None:
        super().__init__()
        self.register_buffer("q", q.to(torch.uint8))
        self.group_of = [i // layer.group_size for i in range(layer.in_features)]
        self.register_buffer("zero", torch.as_tensor(zero))
        self.register_buffer("scale", layer.scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        group = torch.tensor(self.group_of)
        zero = self.zero.index_select(1, group) if self.zero.dim() else self.zero
        weight = (self.q.float() - zero) * self.scale.index_select(1, group)
        return F.linear(x, weight, self.bias)


class Int8Linear(QuantLinear):
    """A QuantLinear of one int8 group a row, multiplied in integers: activations become uint8.

    scale and zero_point are (out, 1).
    """

    one_at_a_time = True  # batch mates and padding change the scale of the activations

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if self.training:
            return super().forward(fakequant.fake_dynamic_quantize(x))
        shape = x.shape
        x, x_scale, x_zero = dynamic_quantize(x.float().flatten(0, -2))
        x_zero = x_zero.to(torch.int32)
        y = integer_product(x, self.qweight)  # (N, out) int32
        y = y - x_zero * self.qweight.sum(1, dtype=torch.int32)
        if self.zero_point is not None:
            total = x.sum(1, keepdim=True, dtype=torch.int32) - x_zero * shape[-1]
            y = y - total * self.zero_point.t().to(torch.int32)
        result = y.float() * (x_scale * self.scale.t())
        if self.bias is not None:
            result = result + self.bias
        return result.view(*shape[:-1], -1)

    def onnx_layer(self, compute: str) -> nn.Module:
        """DynamicQuantizeLinear and MatMulInteger."""
        weight = Integers(self.qweight, self.scale, self.zero_point)
        return onnx_layers.Int8Linear(weight, self.bias)


class QuantConv(nn.Module):
    """A Conv1d or Conv2d with int8 weights and a scale an output channel; computes in float.

    qweight has the shape of the convolution's weight, scale is (out,).
    """

    qweight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, **conv: Any) -> None:
        super().__init__()
        self.args = conv
        shape = convolution.weight_shape(conv)
        self.register_buffer("qweight", torch.empty(shape, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(shape[0]))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(shape[0])) if conv["bias"] else None
        )

    @classmethod
    def from_conv(cls, conv: nn.Conv1d | nn.Conv2d) -> QuantConv:
        layer = cls(**convolution.arguments(conv))
        rows = conv.weight.detach().flatten(1)
        values = rounding.grouped(rows, "int8", rows.shape[1])
        layer.qweight = values.qweight.view_as(conv.weight)
        layer.scale = values.scale[:, 0]
        layer.bias = half_parameter(conv.bias)
        return layer

    def weight(self) -> Tensor:
        """The dequantised weight, shaped as the convolution's."""
        scale = self.scale.view(-1, *[1] * (self.qweight.dim() - 1))
        return self.qweight.to(scale.dtype) * scale

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T) or (B, C, T, F)
        return convolution.convolve(x, self.weight(), self.bias, self.args)

    def extra_repr(self) -> str:
        return f"{convolution.describe(self.args)}, int8"


class Int8Conv(QuantConv):
    """A QuantConv over (B, C, T, F) in integers: its input becomes uint8 and is unfolded."""

    one_at_a_time = True

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T, F) -> (B, N, T', F')
        if self.training:
            return super().forward(fakequant.fake_dynamic_quantize(x))
        values, x_scale, x_zero = dynamic_quantize(x.float())
        top, left = self.args["padding"]
        values = F.pad(values, (left, left, top, top), value=int(x_zero))
        for axis, size, step in zip(
            (2, 3), self.args["kernel_size"], self.args["stride"], strict=True
        ):
            values = values.unfold(axis, size, step)  # in the end (B, C, T', F', kh, kw)
        rows = values.permute(0, 2, 3, 1, 4, 5)
        weight = self.qweight.flatten(1)
        y = integer_product(rows.reshape(-1, weight.shape[1]), weight)
        y = y - x_zero.to(torch.int32) * weight.sum(1, dtype=torch.int32)
        result = y.float() * (x_scale * self.scale)
        if self.bias is not None:
            result = result + self.bias
        return result.view(*rows.shape[:3], -1).movedim(-1, 1)

    def onnx_layer(self, compute: str) -> nn.Module:
        """DynamicQuantizeLinear and MatMulInteger on the unfolded input."""
        weight = Integers(onnx_layers.rows_of_kernel(self.qweight), self.scale)
        sizes = (self.args[key] for key in ("kernel_size", "stride", "padding"))
        return onnx_layers.Int8Conv2d(weight, self.bias, *map(tuple, sizes))


def quantized_conv(conv: nn.Conv1d | nn.Conv2d) -> QuantConv:
    """In integers where the products are many."""
    dense = convolution.is_dense(convolution.arguments(conv))
    return (Int8Conv if dense else QuantConv).from_conv(conv)


def half_parameter(tensor: Tensor | None) -> nn.Parameter | None:
    """A copy as a parameter with fp16 values."""
    return None if tensor is None else nn.Parameter(round_to_half(tensor.detach()))
