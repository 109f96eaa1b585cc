"""The parts of the model as they are exported: the same numbers from fewer and cheaper operations.

`asr.network.model` is written to be trained; what stands here is written for onnxruntime, whose
masks, paddings and changes of layout cost more than the sums they belong to. `export.prepare` puts
these modules in the place of the model's, whose layers, packed or not, they take over.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.network.attention import RelPositionAttention, relative_positions
from asr.network.model import ConvModule, MaskedBatchNorm
from asr.network.parts import of_turn, valid_mask
from asr.network.subsampling import ConvSubsampling
from asr.runtime.features import subsampled_length

NEVER = -1e30  # before a ReLU


def weight_of(conv: nn.Module) -> Tensor:
    """The weight of a convolution, packed or not."""
    weight: Any = conv.weight
    found: Tensor = weight if isinstance(conv, nn.Conv1d | nn.Conv2d) else weight()
    return found


def bias_of(conv: nn.Module) -> Tensor:
    bias: Tensor = cast(Any, conv).bias
    return bias


class LeanSubsampling(nn.Module):
    """ConvSubsampling, its first convolution with a second input that is 1 behind the end.

    At the centre of the kernel that input has a weight which keeps the ReLU shut, so the largest of
    all activations, (B, C, T / 2, n_mels / 2), need no mask. Those of the last stage need none
    either: the blocks mask what they mix frames of.
    """

    def __init__(self, model: ConvSubsampling) -> None:
        super().__init__()
        first = model.convs[0]
        weight = weight_of(first).detach()  # (C, 1, 3, 3)
        shut = torch.zeros_like(weight)
        shut[:, :, 1, 1] = NEVER
        self.first = nn.Conv2d(2, len(weight), 3, 2, 1)
        self.first.weight = nn.Parameter(torch.cat((weight, shut), dim=1), requires_grad=False)
        self.first.bias = nn.Parameter(bias_of(first).detach(), requires_grad=False)
        self.convs, self.pointwise, self.out = model.convs[1:], model.pointwise[1:], model.out

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        padding = ~valid_mask(lengths, features.shape[1]).unsqueeze(-1)  # (B, T, 1)
        x = features.masked_fill(padding, 0)
        x = torch.stack((x, padding.to(x.dtype).expand_as(x)), dim=1)  # (B, 2, T, n_mels)
        x = F.relu(self.first(x))
        lengths = subsampled_length(lengths, 2)
        for stage, (conv, pointwise) in enumerate(zip(self.convs, self.pointwise, strict=True), 2):
            x = conv(x)
            if not isinstance(pointwise, nn.Identity):
                x = pointwise(x.movedim(1, -1)).movedim(-1, 1)
            x = F.relu(x)  # (B, C, T', F')
            lengths = subsampled_length(lengths, 2)
            if stage <= len(self.convs):
                x = x.masked_fill(~valid_mask(lengths, x.shape[2])[:, None, :, None], 0)
        return self.out(x.transpose(1, 2).flatten(2)), lengths


class LeanAttention(nn.Module):
    """RelPositionAttention with one position more, which makes the relative shift two slices."""

    def __init__(self, attention: RelPositionAttention) -> None:
        super().__init__()
        self.d_head = attention.args["d_head"]
        self.norm = attention.norm
        self.query, self.key, self.value = attention.query, attention.key, attention.value
        self.position, self.out = attention.position, attention.out
        self.bias_u, self.bias_v = attention.bias_u, attention.bias_v

    def forward(
        self, x: Tensor, positions: Tensor, padding_bias: Tensor | None, turn: int = 0
    ) -> Tensor:
        """x (B, T, D), padding_bias (B, 1, 1, T); positions are made here, for T ... -(T - 1)."""
        b, t, d = x.shape
        positions = relative_positions(t + 1, d, x)[:-1]  # (2T, D)
        x = of_turn(self.norm, turn)(x)
        query, key, value = (self.heads(linear(x)) for linear in (self.query, self.key, self.value))
        position = self.heads(self.position(positions).unsqueeze(0))  # (1, H, 2T, d_head)
        scale = 1 / math.sqrt(self.d_head)
        bias = (query + self.bias_v) @ position.transpose(2, 3) * scale  # (B, H, T, 2T)
        # entry (i, j) is of distance i - j, in column T - i + j
        bias = bias.flatten(2)[..., t:].view(b, -1, t, 2 * t - 1)[..., :t]
        if padding_bias is not None:
            bias = bias + padding_bias
        scores = (query + self.bias_u) @ key.transpose(2, 3) * scale + bias
        x = torch.softmax(scores, dim=3) @ value
        return self.out(x.transpose(1, 2).flatten(2))  # (B, T, H * d_head) -> (B, T, D)

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, H * d_head) -> (B, H, T, d_head)."""
        return x.view(*x.shape[:2], -1, self.d_head).transpose(1, 2)


class LeanConvModule(nn.Module):
    """ConvModule with a depthwise convolution of two dimensions, which onnxruntime lays out well.

    BatchNorm is folded into it in the graph, where both are constants: what is stored stays small.
    """

    def __init__(self, module: ConvModule) -> None:
        super().__init__()
        self.norm, self.up, self.down = module.norm, module.up, module.down
        self.depthwise, self.batch_norm = module.depthwise, module.batch_norm
        self.padding = module.args["kernel_size"] // 2

    def forward(self, x: Tensor, mask: Tensor | None, turn: int = 0) -> Tensor:
        """x (B, T, D), mask (B, T) true at valid frames."""
        x = F.glu(self.up(of_turn(self.norm, turn)(x)), dim=2)  # (B, T, C)
        if mask is not None:
            x = x * mask.unsqueeze(2).to(x.dtype)
        norm = cast(MaskedBatchNorm, of_turn(self.batch_norm, turn))
        scale = norm.weight * torch.rsqrt(cast(Tensor, norm.running_var) + norm.eps)
        weight = weight_of(self.depthwise) * scale[:, None, None]
        bias = (bias_of(self.depthwise) - cast(Tensor, norm.running_mean)) * scale + norm.bias
        x = x.transpose(1, 2).unsqueeze(2)  # (B, C, 1, T)
        x = F.conv2d(x, weight.unsqueeze(2), bias, 1, (0, self.padding), 1, len(weight))
        return self.down(F.silu(x.squeeze(2).transpose(1, 2)))


def make_lean(model: nn.Module) -> None:
    """Puts the lean modules in the place of the model's own."""
    for name, module in list(model.named_modules()):
        if type(module) is RelPositionAttention:
            model.set_submodule(name, LeanAttention(module), strict=True)
        elif type(module) is ConvModule:
            model.set_submodule(name, LeanConvModule(module), strict=True)
        elif type(module) is ConvSubsampling:
            model.set_submodule(name, LeanSubsampling(module), strict=True)
