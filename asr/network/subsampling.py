"""Fewer frames: the convolutions at the model's start, and the reduction between two blocks.

Axes: B batch, T frames, C channels, F frequencies, D d_model.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from asr.network.parts import cpu_float, no_cpu_autocast, valid_mask
from asr.runtime.features import subsampled_length


class ConvSubsampling(nn.Module):
    """Stride-2 3x3 convolutions over (time, frequency), then a projection to d_model.

    `channels` holds one width a stage. `separable`: every stage after the first is a depthwise
    convolution and a pointwise Linear.
    """

    def __init__(
        self, n_mels: int, d_model: int, channels: list[int], separable: bool = False
    ) -> None:
        super().__init__()
        self.args = {
            "n_mels": n_mels, "d_model": d_model, "channels": list(channels),
            "separable": separable,
        }  # fmt: skip
        self.convs = nn.ModuleList()
        self.pointwise = nn.ModuleList()
        width = 1
        for stage, n in enumerate(channels):
            if separable and stage > 0:
                self.convs.append(nn.Conv2d(width, width, 3, 2, 1, groups=width))
                self.pointwise.append(nn.Linear(width, n))
            else:
                self.convs.append(nn.Conv2d(width, n, 3, 2, 1))
                self.pointwise.append(nn.Identity())
            width = n
        self.out = nn.Linear(width * subsampled_length(n_mels, 2 ** len(channels)), d_model)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = features.masked_fill(~valid_mask(lengths, features.shape[1]).unsqueeze(-1), 0)
        x = x.unsqueeze(1)  # (B, 1, T, n_mels)
        for conv, pointwise in zip(self.convs, self.pointwise, strict=True):
            with no_cpu_autocast():
                x = conv(cpu_float(x))
            if not isinstance(pointwise, nn.Identity):
                x = pointwise(x.movedim(1, -1)).movedim(-1, 1)
            x = F.relu(x)  # (B, C, T', F')
            lengths = subsampled_length(lengths, 2)
            padding = ~valid_mask(lengths, x.shape[2])
            x = x.masked_fill(padding[:, None, :, None], 0)
        x = self.out(x.transpose(1, 2).flatten(2))  # (B, T', C * F') -> (B, T', D)
        return x, lengths


class TimeReduction(nn.Module):
    """Lays `factor` neighbouring frames side by side, and a Linear makes one of them."""

    def __init__(self, d_model: int, d_output: int, factor: int) -> None:
        super().__init__()
        self.args = {"d_model": d_model, "d_output": d_output, "factor": factor}
        self.out = nn.Linear(factor * d_model, d_output)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D) to (B, ceil(T / factor), d_output); frames behind the end count as zeros."""
        factor = self.args["factor"]
        x = x.masked_fill(~valid_mask(lengths, x.shape[1]).unsqueeze(-1), 0)
        x = F.pad(x, (0, 0, 0, -x.shape[1] % factor))
        x = x.reshape(x.shape[0], -1, factor * x.shape[2])
        return self.out(x), subsampled_length(lengths, factor)
