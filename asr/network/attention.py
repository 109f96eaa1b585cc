"""Self-attention with relative positions, and without any.

Relative positions: Dai et al. 2019 (Transformer-XL). Axes: B batch, T frames, D d_model, H heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.network.parts import cpu_float, no_cpu_autocast, of_turn, repeated, several, valid_mask


def relative_positions(n_frames: int, d_model: int, like: Tensor) -> Tensor:
    """Sinusoids (2T - 1, D) for the distances T - 1 ... -(T - 1); computed, so no length limit."""
    distance = torch.arange(n_frames - 1, -n_frames, -1, device=like.device, dtype=torch.float32)
    step = torch.arange(0, d_model, 2, device=like.device, dtype=torch.float32)
    angle = distance.unsqueeze(1) * torch.exp(step * (-math.log(10000.0) / d_model))
    return torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)


def frame_context(
    x: Tensor, lengths: Tensor, padded: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What every block needs to know about x (B, T, D): positions, mask and padding bias."""
    positions = relative_positions(x.shape[1], x.shape[2], x)
    if not padded:
        return positions, None, None
    mask = valid_mask(lengths, x.shape[1])
    bias = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -math.inf)
    return positions, mask, bias[:, None, None]


class PlainAttention(nn.Module):
    """Self-attention that knows no positions: those come from the convolutions around it.

    `n_heads` of width `d_head`; n_heads * d_head may be smaller than d_model (pruned heads).
    `norms`: how many LayerNorms, one for each turn.
    """

    def __init__(self, d_model: int, n_heads: int, d_head: int, norms: int = 1) -> None:
        super().__init__()
        self.args = {"d_model": d_model, "n_heads": n_heads, "d_head": d_head, **several(norms)}
        inner = n_heads * d_head
        self.norm = repeated(lambda: nn.LayerNorm(d_model), norms)
        self.query = nn.Linear(d_model, inner)
        self.key = nn.Linear(d_model, inner)
        self.value = nn.Linear(d_model, inner)
        self.out = nn.Linear(inner, d_model)

    def forward(
        self, x: Tensor, positions: Tensor, padding_bias: Tensor | None, turn: int = 0
    ) -> Tensor:
        """x (B, T, D), padding_bias (B, 1, 1, T), -inf at padding."""
        x = of_turn(self.norm, turn)(x)
        query, key, value = (self.heads(linear(x)) for linear in (self.query, self.key, self.value))
        with no_cpu_autocast():
            x = F.scaled_dot_product_attention(query, key, value, padding_bias)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, T, H * d_head) -> (B, T, D)

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, H * d_head) -> (B, H, T, d_head), float32 on a CPU."""
        x = cpu_float(x)
        return x.view(*x.shape[:2], -1, self.args["d_head"]).transpose(1, 2)


class RelPositionAttention(PlainAttention):
    """Self-attention with relative positions (Transformer-XL), untied biases u and v."""

    def __init__(self, d_model: int, n_heads: int, d_head: int, norms: int = 1) -> None:
        super().__init__(d_model, n_heads, d_head, norms)
        self.position = nn.Linear(d_model, n_heads * d_head, bias=False)
        self.bias_u = nn.Parameter(torch.zeros(n_heads, 1, d_head))
        self.bias_v = nn.Parameter(torch.zeros(n_heads, 1, d_head))

    def forward(
        self, x: Tensor, positions: Tensor, padding_bias: Tensor | None, turn: int = 0
    ) -> Tensor:
        """x (B, T, D), positions (2T - 1, D), padding_bias (B, 1, 1, T), -inf at padding."""
        x = of_turn(self.norm, turn)(x)
        query, key, value = (
            self.heads(linear(x)) for linear in (self.query, self.key, self.value)
        )  # (B, H, T, d_head)
        position = self.heads(self.position(positions).unsqueeze(0))  # (1, H, 2T - 1, d_head)
        with no_cpu_autocast():
            scale = 1 / math.sqrt(self.args["d_head"])
            bias = shift_relative((query + self.bias_v) @ position.transpose(2, 3)) * scale
            if padding_bias is not None:
                bias = bias + padding_bias
            x = attend(query + self.bias_u, key, value, bias, scale)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, T, H * d_head) -> (B, T, D)


def shift_relative(x: Tensor) -> Tensor:
    """(B, H, T, 2T - 1) by distance -> (B, H, T, T) by key: entry (i, j) is distance i - j."""
    b, h, t, n = x.shape
    if x.requires_grad and not torch.compiler.is_compiling():
        x = x.contiguous()  # one strided view: its gradient is one copy, not four
        return x.as_strided((b, h, t, t), (h * t * n, t * n, n - 1, 1), x.storage_offset() + t - 1)
    x = F.pad(x, (1, 0)).flatten(2)[..., t:]  # each row moves one further to the left
    return x.view(b, h, t, n)[..., :t]


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(query key^T * scale + bias) value, all (B, H, T, d_head), bias (B, H, T, T).

    PyTorch's fused kernel, except where a CPU needs the gradient of the bias: there it has none.
    """
    if query.device.type == "cpu" and bias.requires_grad:
        scores = torch.matmul(query * scale, key.transpose(2, 3)) + bias
        return torch.softmax(scores, dim=3) @ value
    query, value = query.to(bias.dtype), value.to(bias.dtype)
    return F.scaled_dot_product_attention(query, key.to(bias.dtype), value, bias, scale=scale)
