"""Weights for integer products, kept in few bits and made int8 as an ONNX file is loaded.

Called, each gives a weight (K, N), K inputs and N outputs; `zero` stands for zero, () or (N,), and
`scale` (N,) float32 is one of each output. How few bytes the parts take in the file is for
`asr.network.onnx_storage`. Inside `torch.onnx.export` operators are emitted which a runtime folds,
for little memory in 8 bits wherever they can; elsewhere torch computes the same integers.

Weights lie within -64 ... 64. On x86 processors without VNNI onnxruntime multiplies uint8 by int8
in pairs and adds these in 16 bits: 255 * 64 * 2 just fits, and larger weights would saturate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.onnx import ops as onnx_ops

LARGEST = 64  # magnitude of a weight
FINEST = 127  # of the multiplier of a group


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
    """Few-bit integers that have a scale for each group of inputs.

    An output's scale is 1 / 64 of what its largest group may hold; a group's own is `multiplier` /
    `steps` times that, in 8 bits: a weight is (q - zero point) * multiplier / steps, rounded. Where
    zero points are halves, multipliers are even, so that all stays in integers.
    """

    q: Tensor
    multiplier: Tensor
    zero_point: Tensor | None
    scale: Tensor
    zero: Tensor

    def __init__(
        self, q: Tensor, scale: Tensor, group_size: int, middle: int,
        zero_point: Tensor | None = None,
    ) -> None:  # fmt: skip
        """q (N, K) of 0 ... 2 * middle; scale (N, G); zero_point (N, G), whole or halves, between
        0 and the largest q, else `middle`.
        """
        super().__init__()
        self.group_size, self.middle, self.parts = group_size, middle, 1  # parts of a zero point
        largest = float(middle)  # of q - zero point
        if zero_point is not None:
            self.parts = 2 if (zero_point % 1).any() else 1
            largest = float((zero_point - (middle - 0.5)).abs().max()) + middle - 0.5
            zero_point = (zero_point * self.parts).to(torch.int8)
        finest = FINEST // self.parts
        self.steps = largest * self.parts * finest / LARGEST
        top = scale.abs().amax(1, keepdim=True)  # (N, 1)
        multiplier = self.parts * (scale / top * finest).round()  # (N, G)
        self.register_buffer("q", q.to(torch.int8))
        self.register_buffer("multiplier", multiplier.to(torch.int8))
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("scale", top.flatten().float() * (largest / LARGEST))
        self.register_buffer("zero", torch.tensor(0, dtype=torch.int8))

    def forward(self) -> Tensor:
        """One QLinearConv with a group of inputs for a channel, all of it in 8 bits.

        No quotient lies in the middle of two integers, so every runtime rounds the same way.
        """
        (n, k), groups, size = self.q.shape, self.multiplier.shape[1], self.group_size
        if not torch.onnx.is_in_onnx_export():
            group = torch.arange(k) // size
            zero: Tensor | int = self.middle
            if self.zero_point is not None:
                zero = self.zero_point[:, group].float() / self.parts
            product = (self.q.float() - zero) * self.multiplier[:, group].float()
            return (product / self.steps).round().to(torch.int8).t()
        one, steps = torch.tensor(1.0), torch.tensor(self.steps)
        nothing = torch.tensor(0, dtype=torch.int8)
        middle, bias = torch.tensor(self.middle, dtype=torch.int8), None
        if self.zero_point is not None:
            middle, zeros = nothing, self.zero_point.to(torch.int32)
            bias = -(zeros * (self.multiplier.to(torch.int32) // self.parts)).flatten()
        q = self.q
        if k % size:
            pads = torch.tensor([0, 0, 0, -k % size])
            q = onnx_ops.symbolic(
                "Pad", (q, pads, nothing), dtype=q.dtype, shape=[n, groups * size], version=19
            )
        weight: Tensor = onnx_ops.symbolic(
            "QLinearConv",
            (
                q.view(1, n * groups, size, 1), one, middle,
                self.multiplier.view(n * groups, 1, 1, 1), one, nothing, steps, nothing, bias,
            ),
            {"kernel_shape": [1, 1], "group": n * groups},
            dtype=torch.int8, shape=[1, n * groups, size, 1], version=10,
        )  # fmt: skip
        return weight.view(n, groups * size)[:, :k].t()


class TableIntegers(nn.Module):
    """Indices of codebooks whose entries are rounded to 8 bits, a scale for each codebook."""

    indices: Tensor
    table: Tensor
    first: Tensor | None
    scale: Tensor
    zero: Tensor

    def __init__(self, indices: Tensor, codebook: Tensor, rows: int) -> None:
        """indices (N, K) uint8, codebook (parts, entries): one for every `rows` outputs."""
        super().__init__()
        n, (parts, entries) = len(indices), codebook.shape
        step = codebook.abs().amax(1) / LARGEST
        step = torch.where(step == 0, torch.ones_like(step), step)
        table = (codebook / step[:, None]).round()
        width = 2 ** (entries - 1).bit_length()  # so that a part's first entry can be or-ed
        table = torch.nn.functional.pad(table, (0, width - entries))
        part = torch.arange(n) // rows
        self.narrow = parts * width <= 256
        first = (part * width).to(torch.uint8 if self.narrow else torch.int32)
        self.register_buffer("indices", indices.t().contiguous())
        self.register_buffer("table", table.flatten().to(torch.int8))
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
        return look_up(self.table, index)


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """The entries of a table (n,) that int32 indices of any shape name."""
    if not torch.onnx.is_in_onnx_export():
        return table[index.to(torch.int64)]
    result: Tensor = onnx_ops.symbolic(
        "Gather", (table, index), {"axis": 0}, dtype=table.dtype, shape=index.shape, version=13
    )
    return result
