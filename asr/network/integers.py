"""Weights for integer products, kept in few bits and made int8 as an ONNX file is loaded.

Called, each gives a weight (K, N), K inputs and N outputs; `zero` stands for zero, () or (N,), and
`scale` (N,) float32 is one of each output. How few bytes the parts take in the file is for
`asr.network.onnx_storage`. Inside `torch.onnx.export` operators are emitted which a runtime folds,
for little memory in 8 bits wherever they can; elsewhere torch computes the same integers.

Weights lie within -64 ... 64. On x86 processors without VNNI onnxruntime multiplies uint8 by int8
in pairs and adds these in 16 bits: 255 * 64 * 2 just fits, and larger weights would saturate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.onnx import ops as onnx_ops

LARGEST = 64  # magnitude of a weight
FINEST = 127  # of the multiplier of a group
BLOCK = 16  # inputs that are unpacked together, or a part of them that a group is made of


class Integers(nn.Module):
    """Integers of 8 bits; halved and rounded to even where they are larger than `LARGEST`.

    With zero points they stay as they are, in uint8: such products are exact and slower.
    """

    qweight: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, qweight: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """qweight (N, K) int8, scale (N,); zero_point (N,) int8, else 0."""
        super().__init__()
        scale, q = scale.float().reshape(-1), qweight.t().float()
        if zero_point is not None:
            q, zero = (q + 128).to(torch.uint8), (zero_point.flatten().float() + 128)
        elif q.abs().max() > LARGEST:
            q, scale = (q / 2).round(), scale * 2
        dtype = torch.int8 if zero_point is None else torch.uint8
        zero = torch.tensor(0) if zero_point is None else zero
        self.register_buffer("qweight", q.to(dtype).contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero.to(dtype))

    def forward(self) -> Tensor:
        return self.qweight


class GroupedIntegers(nn.Module):
    """Integers of 4 or 2 bits that have a scale for each group of inputs.

    An output's scale is 1 / 64 of what its largest group may hold; a group's own is `multiplier` /
    `steps` times that, in 8 bits: a weight is (q - zero point) * multiplier / steps, rounded. Where
    zero points are halves, multipliers are even, so that all stays in integers.

    A byte holds one input of each part of a block, the last part less 2 ** (bits - 1), so that with
    its sign it is the byte's own value as soon as the others are masked out.
    """

    packed: Tensor
    multiplier: Tensor
    zero_point: Tensor | None
    scale: Tensor
    zero: Tensor

    def __init__(
        self, q: Tensor, scale: Tensor, group_size: int, middle: int,
        zero_point: Tensor | None = None,
    ) -> None:  # fmt: skip
        """q (N, K) of 0 ... 2 * middle - 1; scale (N, G); zero_point (N, G), whole or halves,
        between 0 and the largest q, else `middle`.
        """
        super().__init__()
        self.n, self.k = q.shape
        self.group_size, self.middle, self.halves = group_size, middle, 1
        largest = float(middle)  # of q - zero point
        if zero_point is not None:
            self.halves = 2 if (zero_point % 1).any() else 1
            largest = float((zero_point - (middle - 0.5)).abs().max()) + middle - 0.5
            zero_point = (zero_point * self.halves).to(torch.int8)
        finest = FINEST // self.halves
        self.steps = largest * self.halves * finest / LARGEST
        top = scale.abs().amax(1, keepdim=True)  # (N, 1)
        multiplier = self.halves * (scale / top * finest).round()  # (N, G)
        self.bits = (2 * middle - 1).bit_length()
        self.block = math.gcd(group_size, BLOCK)
        self.parts = 8 // self.bits if self.block % (8 // self.bits) == 0 else 1
        self.register_buffer("packed", self.pack(q))  # (1, N * blocks, block / parts, 1)
        self.register_buffer("multiplier", multiplier.to(torch.int8))
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("scale", top.flatten().float() * (largest / LARGEST))
        self.register_buffer("zero", torch.tensor(0, dtype=torch.int8))

    def pack(self, q: Tensor) -> Tensor:
        q = nn.functional.pad(q.to(torch.int64), (0, -self.k % self.block))
        parts = q.reshape(-1, self.parts, self.block // self.parts)
        places = 2 ** (self.bits * torch.arange(self.parts))
        parts = parts * places[:, None]
        parts[:, -1] -= self.middle * places[-1]
        return parts.sum(1).to(torch.int8)[None, :, :, None]

    def forward(self) -> Tensor:
        """A QLinearConv for each part with a block for a channel, all of it in 8 bits.

        No quotient lies in the middle of two integers, so every runtime rounds the same way.
        """
        blocks = -(-self.k // self.block)
        group = torch.tensor([i * self.block // self.group_size for i in range(blocks)])
        multiplier = self.multiplier.index_select(1, group).flatten()  # (N * blocks,)
        products = None  # of the zero points
        if self.zero_point is not None:
            zeros = self.zero_point.index_select(1, group).flatten()
            products = zeros.to(torch.int32) * (multiplier.to(torch.int32) // self.halves)
        parts = []
        for part in range(self.parts):
            place, last = 2 ** (self.bits * part), part == self.parts - 1
            masked = self.packed
            if self.parts > 1:  # of the last part its sign is kept; a scalar mask would be slow
                mask = -place if last else (2**self.bits - 1) * place
                masked = masked & torch.full((1, 1, 1, 1), mask, dtype=torch.int8)
            zero, bias = 0 if last else self.middle * place, None
            if products is not None:
                zero, bias = 0, -products * place
                if last:
                    bias = bias + multiplier.to(torch.int32) * (self.middle * place)
            parts.append(multiply_rows(masked, multiplier, bias, zero, self.steps * place))
        weight = torch.cat(parts, 2).view(self.n, blocks * self.block)
        return weight[:, : self.k].t()


def multiply_rows(x: Tensor, by: Tensor, bias: Tensor | None, zero: int, steps: float) -> Tensor:
    """((x - zero) * by + bias) / steps, rounded: x (1, R, C, 1) and by (R,) int8, bias int32."""
    if not torch.onnx.is_in_onnx_export():
        product = (x.double() - zero) * by.double()[:, None, None]
        product = product if bias is None else product + bias.double()[:, None, None]
        return (product / steps).round().to(torch.int8)
    one, nothing = torch.tensor(1.0), torch.tensor(0, dtype=torch.int8)
    result: Tensor = onnx_ops.symbolic(
        "QLinearConv",
        (
            x, one, torch.tensor(zero, dtype=torch.int8), by.view(-1, 1, 1, 1), one, nothing,
            torch.tensor(float(steps)), nothing, bias,
        ),
        {"kernel_shape": [1, 1], "group": len(by)},
        dtype=torch.int8, shape=x.shape, version=10,
    )  # fmt: skip
    return result


class TernaryIntegers(nn.Module):
    """Weights -1, 0 and 1 times one of 0 ... 64 for each group of inputs."""

    sign: Tensor
    multiplier: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, sign: Tensor, scale: Tensor, group_size: int) -> None:
        """sign (N, K) of -1 ... 1; scale (N, G)."""
        super().__init__()
        self.group_size = group_size
        top = scale.abs().amax(1, keepdim=True)  # (N, 1)
        multiplier = (scale / top * LARGEST).round()
        self.register_buffer("sign", sign.to(torch.int8).t().contiguous())
        self.register_buffer("multiplier", multiplier.to(torch.int8).t().contiguous())  # (G, N)
        self.register_buffer("scale", top.flatten().float() / LARGEST)
        self.register_buffer("zero", torch.tensor(0, dtype=torch.int8))

    def forward(self) -> Tensor:
        group = torch.tensor([i // self.group_size for i in range(len(self.sign))])
        return self.sign * self.multiplier.index_select(0, group)


class TableIntegers(nn.Module):
    """Indices of codebooks whose entries are rounded to 8 bits, a scale for each codebook.

    Of 9 to 16 entries a byte holds two indices, of a row of the first half of the inputs and of the
    second, and is looked up as it is in two tables that know one half of it.
    """

    indices: Tensor
    table: Tensor
    first: Tensor | None
    scale: Tensor
    zero: Tensor

    def __init__(self, indices: Tensor, codebook: Tensor, rows: int) -> None:
        """indices (N, K) uint8, codebook (parts, entries): one for every `rows` outputs."""
        super().__init__()
        n, self.k = indices.shape
        parts, entries = codebook.shape
        step = codebook.abs().amax(1) / LARGEST
        step = torch.where(step == 0, torch.ones_like(step), step)
        table = (codebook / step[:, None]).round()
        width = 2 ** (entries - 1).bit_length()  # so that a part's first entry can be or-ed
        table = nn.functional.pad(table, (0, width - entries))
        part = torch.arange(n) // rows
        self.pairs = width == 16
        indices = indices.t()
        if self.pairs:
            low, high = nn.functional.pad(indices, (0, 0, 0, self.k % 2)).chunk(2)
            indices, width = low | high << 4, 256
        self.narrow = parts * width <= 256
        first = (part * width).to(torch.uint8 if self.narrow else torch.int32)
        self.register_buffer("indices", indices.contiguous())
        self.register_buffer("table", table.to(torch.int8))  # (parts, entries)
        self.register_buffer("first", first if parts > 1 else None)
        self.register_buffer("scale", step[part].float())
        self.register_buffer("zero", torch.tensor(0, dtype=torch.int8))

    def forward(self) -> Tensor:
        index = self.indices
        if self.first is not None and self.narrow:
            index = index.bitwise_or(self.first)
        index = index.to(torch.int32)
        if self.first is not None and not self.narrow:
            index = index + self.first
        if not self.pairs:
            return look_up(self.table.flatten(), index)
        halves = [b % 16 for b in range(256)], [b // 16 for b in range(256)]
        tables = [self.table.index_select(1, torch.tensor(half)).flatten() for half in halves]
        weight = torch.cat([look_up(table, index) for table in tables])
        return weight[: self.k] if self.k % 2 else weight


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """The entries of a table (n,) that int32 indices of any shape name."""
    if not torch.onnx.is_in_onnx_export():
        return table[index.to(torch.int64)]
    result: Tensor = onnx_ops.symbolic(
        "Gather", (table, index), {"axis": 0}, dtype=table.dtype, shape=index.shape, version=13
    )
    return result
