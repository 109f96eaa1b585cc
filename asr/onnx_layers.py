"""Packed weights in onnxruntime's own operators: what stands in for a compressed layer on export.

A compressed layer that has a method `onnx_layer()` returns one of these modules, filled with the
same integers as its checkpoint; `asr.export` puts it in the layer's place. A layer without that
method is exported as its `forward` is written, in plain arithmetic. Inside `torch.onnx.export` the
modules below emit the operators; elsewhere they compute in torch what onnxruntime will.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx import ops as onnx_ops

MICROSOFT = "com.microsoft"


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
        self.register_buffer("qweight", qweight.t().contiguous())  # (K, N) int8
        self.register_buffer("scale", scale.float().reshape(-1))
        self.register_buffer("bias", None if bias is None else bias.float())

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        q, x_scale, zero_point = dynamic_quantize(x)
        y = matmul_integer(q, self.qweight, zero_point) * (x_scale * self.scale)
        return y if self.bias is None else y + self.bias


def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x as uint8, with its scale and zero point (scalars): ONNX's DynamicQuantizeLinear."""
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


def matmul_integer(q: Tensor, qweight: Tensor, zero_point: Tensor) -> Tensor:
    """(q - zero_point) @ qweight in int32, as float32; q (..., K) uint8, qweight (K, N) int8."""
    shape = [*q.shape[:-1], qweight.shape[1]]
    if torch.onnx.is_in_onnx_export():
        y = onnx_ops.symbolic(
            "MatMulInteger", (q, qweight, zero_point), dtype=torch.int32, shape=shape, version=10
        )
        return y.float()
    centred = q.reshape(-1, q.shape[-1]).double() - zero_point.double()
    return (centred @ qweight.double()).float().reshape(shape)


class NBitsLinear(nn.Module):
    """y = x @ weight.T + bias with `bits`-bit weights in groups: onnxruntime's MatMulNBits.

    `q` (N, K) unsigned integers below 2**bits, `scale` (N, G) and `zero_point` (N, G) of each group
    of `group_size` inputs, G = ceil(K / group_size); a weight is scale * (q - zero_point). Without
    `zero_point` it is 2**(bits - 1). The operator quantises activations by groups too, so batch
    mates change nothing.
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
                "accuracy_level": 4,
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
