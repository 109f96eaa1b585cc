"""Weights as integers times scales: int8, int4, ternary; or every number as fp16.

- int8: one scale an output channel, activations quantised at run time as ONNX's
  DynamicQuantizeLinear does, exact integer products (Jacob et al. 2018, arXiv 1712.05877).
- int4: groups along the input, the scale of least squared error, weights dequantised at run time.
- ternary {-1, 0, 1}: likewise, the best scale is known exactly (Li et al. 2016, arXiv 1605.04711).
- fp16: every number rounded to half precision; computed in float32.

Convolutions are stored in int8 and dequantised; scales, biases and norms are rounded to fp16. With
`activation_aware`, calibration speech weighs the errors (`compress.rounding`). With fine-tuning,
training sees the quantised weights (`compress.fakequant`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr import onnx_layers
from compress import convolution, core, fakequant, packing, rounding
from compress.calibration import input_grams, need
from compress.equalization import equalize

PRECISIONS = ("int8", "int4", "ternary", "fp16")
GROUP_SIZE = {"int4": 32, "ternary": 64}
ENDS = "subsampling.*,head"


@dataclass(frozen=True)
class Config(core.Selection):
    """Options of quantization."""

    precision: str = field(
        default="int8", metadata={"help": "how weights are stored", "choices": PRECISIONS}
    )
    group_size: int = field(
        default=0, metadata={"help": "weights a scale (0: 32 for int4, 64 for ternary)"}
    )
    ends: str = field(
        default="int8",
        metadata={
            "help": "precision of the subsampling and the output layer under int4 and ternary",
            "choices": ("int8", "same"),
        },
    )
    asymmetric: bool = field(default=False, metadata={"help": "a zero point beside the scale"})
    activation_aware: bool = field(
        default=False, metadata={"help": "weigh errors by calibration speech (int4 and ternary)"}
    )

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.ends not in ("int8", "same"):
            raise ValueError(f"ends {self.ends!r} is not one of int8, same")
        grouped = self.precision in GROUP_SIZE
        if self.group_size < 0 or (self.group_size and not grouped):
            raise ValueError("group_size must be positive, and is for int4 and ternary only")
        if self.asymmetric and self.precision not in ("int8", "int4"):
            raise ValueError(f"asymmetric is for int8 and int4, not {self.precision}")
        if self.activation_aware and not grouped:
            raise ValueError(f"activation_aware is for int4 and ternary, not {self.precision}")

    @property
    def needs_calibration(self) -> bool:
        return self.activation_aware

    def at(self, name: str) -> tuple[str, int, bool]:
        """Precision, group size (0: the whole row) and asymmetry of a layer."""
        if self.precision == "int8":
            return "int8", 0, self.asymmetric
        if self.ends == "int8" and core.selected(name, ENDS):
            return "int8", 0, False
        return self.precision, self.group_size or GROUP_SIZE[self.precision], self.asymmetric


def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX's DynamicQuantizeLinear: uint8 values like x, scale () float32, zero point () int32.

    x is about (values - zero_point) * scale; the range includes 0, halves round to even.
    """
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = (-low / scale).clamp(0, 255).round()
    values = ((x / scale).round() + zero_point).clamp(0, 255).to(torch.uint8)
    return values, scale, zero_point.to(torch.int32)


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, in) uint8 times weight (out, in) int8, transposed: exact int32 (N, out)."""
    if x.is_cpu:
        return torch._int_mm(x, weight.t())
    return (x.double() @ weight.t().double()).to(torch.int32)


class QuantLinear(nn.Module):
    """y = x @ W.T + bias, W = (qweight - zero_point) * scale by groups along the input.

    qweight (out, in) int8 of -8..7 (int4) or -1..1 (ternary); scale and zero_point (out, groups);
    the last group may be shorter.
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
        layer.qweight, layer.scale, layer.zero_point = values
        layer.bias = half_parameter(bias)
        return layer

    def weight(self) -> Tensor:
        """The dequantised weight (out, in)."""
        return rounding.dequantize(self.qweight, self.scale, self.zero_point, self.group_size)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return F.linear(x, self.weight().to(x.dtype), self.bias)

    def onnx_layer(self) -> nn.Module:
        """int4: onnxruntime's MatMulNBits; ternary: five weights a byte, unpacked in the graph."""
        if self.precision == "int4":
            zero_point = None if self.zero_point is None else self.zero_point + 8
            return onnx_layers.NBitsLinear(
                self.qweight + 8, self.scale, self.bias, zero_point, 4, self.group_size
            )
        return _UnpackedInGraph(self)

    def extra_repr(self) -> str:
        group = f", group {self.group_size}" if self.group_size < self.in_features else ""
        asymmetric = ", asymmetric" if self.args["asymmetric"] else ""
        return (
            f"{self.in_features}, {self.args['out_features']}, {self.precision}{group}{asymmetric}"
        )


class _UnpackedInGraph(nn.Module):
    """A ternary QuantLinear for export: integers packed as in the checkpoint, scales in fp16."""

    scale: Tensor

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.group_size = layer.group_size
        self.integers = packing.PackedIntegers(layer.qweight, -1, 3)
        self.register_buffer("scale", layer.scale.to(torch.float16))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.float()
        weight = rounding.dequantize(self.integers(), scale, None, self.group_size)
        return F.linear(x, weight, self.bias)


class Int8Linear(QuantLinear):
    """A QuantLinear of one int8 group a row, multiplied in integers: activations become uint8.

    scale and zero_point are (out, 1).
    """

    one_at_a_time = True  # batch mates and padding change the scale of the activations

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        shape = x.shape
        x, x_scale, x_zero = dynamic_quantize(x.float().flatten(0, -2))
        y = integer_product(x, self.qweight)  # (N, out) int32
        y = y - x_zero * self.qweight.sum(1, dtype=torch.int32)
        if self.zero_point is not None:
            total = x.sum(1, keepdim=True, dtype=torch.int32) - x_zero * shape[-1]
            y = y - total * self.zero_point.t().to(torch.int32)
        result = y.float() * (x_scale * self.scale.t())
        if self.bias is not None:
            result = result + self.bias
        return result.view(*shape[:-1], -1)

    def onnx_layer(self) -> nn.Module:
        """DynamicQuantizeLinear and MatMulInteger; zero points of weights as a correction."""
        plain = onnx_layers.Int8Linear(self.qweight, self.scale, self.bias)
        return plain if self.zero_point is None else _WithZeroPoints(plain, self.zero_point[:, 0])


class _WithZeroPoints(nn.Module):
    """For export: an int8 product of weights that have zero points (out,)."""

    one_at_a_time = True
    plain: onnx_layers.Int8Linear
    zero_point: Tensor

    def __init__(self, plain: onnx_layers.Int8Linear, zero_point: Tensor) -> None:
        super().__init__()
        self.plain = plain
        self.register_buffer("zero_point", zero_point)

    def forward(self, x: Tensor) -> Tensor:
        q, x_scale, x_zero = onnx_layers.dynamic_quantize(x)
        y = onnx_layers.matmul_integer(q, self.plain.qweight, x_zero)
        total = (q.float() - x_zero.float()).sum(-1, keepdim=True)
        y = (y - total * self.zero_point.float()) * (x_scale * self.plain.scale)
        return y if self.plain.bias is None else y + self.plain.bias


class QuantConv(nn.Module):
    """A Conv1d or Conv2d with int8 weights and a scale an output channel; computes in float."""

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


def half_parameter(tensor: Tensor | None) -> nn.Parameter | None:
    """A copy as a parameter with fp16 values."""
    return None if tensor is None else nn.Parameter(core.round_to_half(tensor.detach()))


def apply(
    model: nn.Module, config: Config, calibration: core.Calibration | None = None
) -> nn.Module:
    """Replaces Linears and convolutions by integer ones, rounds all that is left to fp16."""
    return _apply(model, config, calibration, training=False)


def prepare(
    model: nn.Module, config: Config, calibration: core.Calibration | None = None
) -> nn.Module:
    """`apply` for quantisation-aware training: Linears become `FakeQuantLinear`."""
    return _apply(model, config, calibration, training=True)


def freeze(model: nn.Module) -> nn.Module:
    """Turns every `FakeQuantLinear` into the layer that is stored, with the same weights."""
    for name, fake in list(model.named_modules()):
        if isinstance(fake, fakequant.FakeQuantLinear):
            cls = Int8Linear if fake.precision == "int8" else QuantLinear
            stored = cls.from_values(fake.quantized(), fake.bias, fake.precision, fake.group_size)
            core.replace(model, name, stored)
    core.round_rest(model)
    return model


def _apply(
    model: nn.Module, config: Config, calibration: core.Calibration | None, training: bool
) -> nn.Module:
    chosen = core.layers(model, config.include, config.exclude, (nn.Linear, *core.CONVOLUTIONS))
    grams: dict[str, Tensor] = {}
    if config.activation_aware:
        calibration = need(calibration, "activation_aware")
        names = [n for n, m in chosen if type(m) is nn.Linear and config.at(n)[0] != "int8"]
        grams = input_grams(model, calibration, names)
        grams = equalize(model, grams, lambda name, *given: approximation(config, name, *given))
    for name, layer in core.progress(chosen):
        if config.precision == "fp16":
            core.round_own(layer)
        elif isinstance(layer, nn.Conv1d | nn.Conv2d):
            core.replace(model, name, QuantConv.from_conv(layer))
        else:
            assert isinstance(layer, nn.Linear)
            replacement = quantized_linear(layer, *config.at(name), grams.get(name), training)
            core.replace(model, name, replacement)
    core.round_rest(model)
    return model


def approximation(config: Config, name: str, weight: Tensor, importance: Tensor) -> Tensor:
    """What a layer's weight becomes (out, in), its columns' errors weighed by `importance`."""
    precision, group_size, asymmetric = config.at(name)
    values = rounding.grouped(weight, precision, group_size, asymmetric, importance)
    return rounding.dequantize(*values, group_size)


def quantized_linear(
    linear: nn.Linear, precision: str, group_size: int, asymmetric: bool,
    gram: Tensor | None = None, training: bool = False,
) -> nn.Module:  # fmt: skip
    """The layer in place of a Linear, to be stored or to be trained."""
    weight = linear.weight.detach()
    group_size = group_size or linear.in_features
    if gram is None:
        values = rounding.grouped(weight, precision, group_size, asymmetric)
    else:
        values = rounding.compensated(weight, precision, group_size, asymmetric, gram)
    if training:
        return fakequant.FakeQuantLinear.from_values(linear, values, precision, group_size)
    cls = Int8Linear if precision == "int8" else QuantLinear
    return cls.from_values(values, linear.bias, precision, group_size)
