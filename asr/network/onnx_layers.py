"""Packed weights in onnxruntime's own operators: what stands in for a compressed layer on export.

A compressed layer that has a method `onnx_layer()` returns one of these modules, filled with the
same integers as its checkpoint; `export` puts it in the layer's place. A layer without that
method is exported as its `forward` is written, in plain arithmetic. Inside `torch.onnx.export` the
modules below emit the operators; elsewhere they compute in torch what onnxruntime will.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx import ops as onnx_ops

MICROSOFT = "com.microsoft"
HALF = 128  # what an int8 weight of zero becomes as uint8


class Int8Linear(nn.Module):
    """y = scale * (x - zero) @ weight.T + bias, in integers; activations quantised as they come.

    `qweight` (N, K) int8, `scale` (N,) float32 of each output, `bias` (N,) or None. The activations
    get one 8-bit scale a call, so batch mates and padding change the result a little.
    """

    one_at_a_time = True
    qweight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, qweight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("qweight", unsigned(qweight.t()))  # (K, N) uint8
        self.register_buffer("scale", scale.float().reshape(-1))
        self.register_buffer("bias", None if bias is None else bias.float())

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        q, x_scale, zero_point = dynamic_quantize(x)
        y = matmul_integer(q, self.qweight, zero_point) * (x_scale * self.scale)
        return y if self.bias is None else y + self.bias


class Int8Conv2d(nn.Module):
    """A convolution over (B, C, T, F) in integers: its input quantised once, unfolded, multiplied.

    `qweight` (N, C, kh, kw) int8, `scale` (N,) float32 of each output channel, `bias` (N,) or None;
    one group, no dilation. onnxruntime's own ConvInteger is slower than a float convolution.
    """

    one_at_a_time = True
    qweight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        qweight: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = qweight.shape[2:], stride, padding
        rows = qweight.permute(2, 3, 1, 0).flatten(0, 2)
        self.register_buffer("qweight", unsigned(rows))  # (kh * kw * C, N) uint8
        self.register_buffer("scale", scale.float().reshape(-1))
        self.register_buffer("bias", None if bias is None else bias.float())

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T, F) -> (B, N, T', F')
        q, x_scale, zero_point = dynamic_quantize(x)
        patches = self.unfold(q.permute(0, 2, 3, 1), zero_point)
        y = matmul_integer(patches, self.qweight, zero_point) * (x_scale * self.scale)
        y = y if self.bias is None else y + self.bias
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


def unsigned(qweight: Tensor) -> Tensor:
    """int8 weights as uint8 around HALF, a contiguous copy.

    onnxruntime multiplies uint8 by int8 in pairs whose sum saturates at 16 bits on x86 processors
    without VNNI; uint8 by uint8 is exact everywhere and as fast where there is VNNI.
    """
    return (qweight.to(torch.int16) + HALF).to(torch.uint8).contiguous()


def matmul_integer(q: Tensor, qweight: Tensor, zero_point: Tensor) -> Tensor:
    """(q - zero_point) @ (qweight - HALF), exact, as float32; q (..., K), qweight (K, N) uint8."""
    shape = [*q.shape[:-1], qweight.shape[1]]
    if torch.onnx.is_in_onnx_export():
        half = torch.tensor(HALF, dtype=torch.uint8)
        y = onnx_ops.symbolic(
            "MatMulInteger", (q, qweight, zero_point, half),
            dtype=torch.int32, shape=shape, version=10,
        )  # fmt: skip
        return y.float()
    centred = q.reshape(-1, q.shape[-1]).double() - zero_point.double()
    return (centred @ (qweight.double() - HALF)).float().reshape(shape)


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
