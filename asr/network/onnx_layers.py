"""Packed weights in onnxruntime's own operators: what stands in for a compressed layer on export.

A compressed layer with a method `onnx_layer(compute)` returns one of these modules, filled with the
integers of its checkpoint; `export` puts it in the layer's place. A layer without that method is
exported as its `forward` is written, in plain arithmetic. Inside `torch.onnx.export` the modules
below emit the operators; elsewhere they compute in torch what onnxruntime will.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx import ops as onnx_ops

MICROSOFT = "com.microsoft"


class Int8Linear(nn.Module):
    """y = (x - zero) @ weight * scale + bias, in integers; activations quantised as they come.

    `weight` is one of `asr.network.integers`, K inputs and N outputs; `bias` (N,) or None. The
    activations get one 8-bit scale a call, so batch mates and padding change the result a little.
    """

    one_at_a_time = True
    bias: Tensor | None

    def __init__(self, weight: nn.Module, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("bias", None if bias is None else bias.float())

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        return integer_linear(*dynamic_quantize(x), self.weight, self.bias)


class Int8Conv2d(nn.Module):
    """A convolution over (B, C, T, F) in integers: its input quantised once, unfolded, multiplied.

    `weight` is one of `asr.network.integers`, of kh * kw * C inputs and N outputs; `bias` (N,) or
    None; one group, no dilation. onnxruntime's own ConvInteger is slower than a float convolution.
    """

    one_at_a_time = True
    bias: Tensor | None

    def __init__(
        self,
        weight: nn.Module,
        bias: Tensor | None,
        kernel: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.weight = weight
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.register_buffer("bias", None if bias is None else bias.float())

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T, F) -> (B, N, T', F')
        q, x_scale, zero_point = dynamic_quantize(x.permute(0, 2, 3, 1))
        patches = self.unfold(q, zero_point)
        y = integer_linear(patches, x_scale, zero_point, self.weight, self.bias)
        return y.permute(0, 3, 1, 2)

    def unfold(self, q: Tensor, zero_point: Tensor) -> Tensor:
        """q (B, T, F, C) uint8 -> (B, T', F', kh * kw * C) uint8; the border is the zero point."""
        (p, r), kernel, stride = self.padding, self.kernel, self.stride
        b, t, f, c = q.shape
        q = pad_uint8(q, [0, p, r, 0, 0, p, r, 0], zero_point)
        size = [
            (n - k) // s + 1 for n, k, s in zip((t + 2 * p, f + 2 * r), kernel, stride, strict=True)
        ]
        shifted = [
            strided_slice(q, (i, j), (kernel[0] - 1 - i, kernel[1] - 1 - j), stride, [b, *size, c])
            for i in range(kernel[0])
            for j in range(kernel[1])
        ]
        return torch.cat(shifted, dim=3)


def pad_uint8(q: Tensor, pads: list[int], value: Tensor) -> Tensor:
    """q (B, T, F, C) with `pads` before each axis, then after each, all of a scalar `value`."""
    if not torch.onnx.is_in_onnx_export():
        _, top, left, _, _, bottom, right, _ = pads
        return F.pad(q, (0, 0, left, right, top, bottom), value=int(value))
    shape = [
        n + before + after for n, before, after in zip(q.shape, pads[:4], pads[4:], strict=True)
    ]
    return onnx_ops.symbolic(
        "Pad", (q, torch.tensor(pads), value), dtype=torch.uint8, shape=shape, version=19
    )


def strided_slice(
    q: Tensor,
    start: tuple[int, int],
    before_end: tuple[int, int],
    step: tuple[int, int],
    shape: list[int],
) -> Tensor:
    """q (B, T, F, C) from `start` to `before_end` from the end in T and F, every `step`-th."""
    if not torch.onnx.is_in_onnx_export():
        stop = [n - m for n, m in zip(q.shape[1:3], before_end, strict=True)]
        return q[:, start[0] : stop[0] : step[0], start[1] : stop[1] : step[1]]
    ends = [-m if m else torch.iinfo(torch.int64).max for m in before_end]
    where = [torch.tensor(list(v)) for v in (start, ends, (1, 2), step)]
    return onnx_ops.symbolic("Slice", (q, *where), dtype=torch.uint8, shape=shape, version=13)


def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX's DynamicQuantizeLinear: uint8 values like x, scale () float32, zero point () uint8.

    x is about (values - zero_point) * scale; the range includes 0, halves round to even.
    """
    if torch.onnx.is_in_onnx_export():
        q, scale, zero_point = onnx_ops.symbolic_multi_out(
            "DynamicQuantizeLinear",
            (x,),
            dtypes=(torch.uint8, torch.float32, torch.uint8),
            shapes=(x.shape, [], []),
            version=11,
        )
        return q, scale, zero_point
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = (-low / scale).round().clamp(0, 255)
    q = ((x / scale).round() + zero_point).clamp(0, 255)
    return q.to(torch.uint8), scale, zero_point.to(torch.uint8)


def rows_of_kernel(weight: Tensor) -> Tensor:
    """(N, C, kh, kw), or what goes with it, as `Int8Conv2d` multiplies it: (N, kh * kw * C)."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def integer_linear(
    q: Tensor, x_scale: Tensor, x_zero: Tensor, weight: nn.Module, bias: Tensor | None
) -> Tensor:
    """The product of quantised inputs (..., K) and a weight of `asr.network.integers`."""
    product = matmul_integer(q, weight(), x_zero, weight.get_buffer("zero"))
    y = product * (x_scale * weight.get_buffer("scale"))
    return y if bias is None else y + bias


def matmul_integer(q: Tensor, qweight: Tensor, q_zero: Tensor, w_zero: Tensor) -> Tensor:
    """(q - q_zero) @ (qweight - w_zero), exact, as float32; q (..., K) uint8, qweight (K, N)."""
    shape = [*q.shape[:-1], qweight.shape[1]]
    if torch.onnx.is_in_onnx_export():
        y = onnx_ops.symbolic(
            "MatMulInteger", (q, qweight, q_zero, w_zero),
            dtype=torch.int32, shape=shape, version=10,
        )  # fmt: skip
        return y.float()
    centred = q.reshape(-1, q.shape[-1]).double() - q_zero.double()
    return (centred @ (qweight.double() - w_zero.double())).float().reshape(shape)


class NBitsLinear(nn.Module):
    """y = x @ weight.T + bias with `bits`-bit weights in groups: onnxruntime's MatMulNBits.

    `q` (N, K) unsigned integers below 2**bits, `scale` (N, G) and `zero_point` (N, G) of each group
    of `group_size` inputs, G = ceil(K / group_size); a weight is scale * (q - zero_point). Without
    `zero_point` it is 2**(bits - 1). The product is in float32, as in the checkpoint: the
    8-bit activations that the operator also offers change the texts of an unsure model.
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        q: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        zero_point: Tensor | None = None,
        bits: int = 4,
        group_size: int = 32,
    ) -> None:
        super().__init__()
        self.n, self.k = q.shape
        self.bits, self.group_size = bits, group_size
        groups = -(-self.k // group_size)
        half = 2 ** (bits - 1)
        q = F.pad(q.to(torch.int64), (0, groups * group_size - self.k), value=half)
        packed = pack_bits(q.reshape(self.n, groups, group_size), bits)
        self.register_buffer("qweight", packed)  # (N, G, group_size * bits / 8) uint8
        self.register_buffer("scale", scale.float().reshape(self.n, groups))
        if zero_point is not None:
            per_byte = 8 // bits
            zero_point = zero_point.to(torch.int64).reshape(self.n, groups)
            zero_point = pack_bits(F.pad(zero_point, (0, -groups % per_byte)), bits)
        self.register_buffer("zero_point", zero_point)  # (N, ceil(G * bits / 8)) uint8
        self.register_buffer("bias", None if bias is None else bias.float())

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        if not torch.onnx.is_in_onnx_export():
            return F.linear(x, self.weight(), self.bias)
        y = onnx_ops.symbolic(
            f"{MICROSOFT}::MatMulNBits",
            (x, self.qweight, self.scale, self.zero_point),
            {
                "K": self.k, "N": self.n, "bits": self.bits, "block_size": self.group_size,
                "accuracy_level": 1,
            },
            dtype=torch.float32,
            shape=[*x.shape[:-1], self.n],
            version=1,
        )  # fmt: skip
        return y if self.bias is None else y + self.bias

    def weight(self) -> Tensor:
        """The weights (N, K) as floats."""
        q = unpack_bits(self.qweight, self.bits)  # (N, G, group_size)
        zero: Tensor | float = 2 ** (self.bits - 1)
        if self.zero_point is not None:
            zero = unpack_bits(self.zero_point, self.bits)[:, : self.scale.shape[1], None]
        return ((q - zero) * self.scale.unsqueeze(2)).flatten(1)[:, : self.k]


def pack_bits(q: Tensor, bits: int) -> Tensor:
    """Integers below 2**bits into uint8 along the last axis, the first in the lowest bits."""
    per_byte = 8 // bits
    weights = 2 ** (bits * torch.arange(per_byte))
    digits = q.reshape(*q.shape[:-1], -1, per_byte)
    packed: Tensor = (digits * weights).sum(-1)
    return packed.to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """What `pack_bits` packed, as float32."""
    shifts = 2 ** (bits * torch.arange(8 // bits))
    digits: Tensor = packed.to(torch.int64).unsqueeze(-1) // shifts % 2**bits
    return digits.flatten(-2).float()
