"""Conformer-CTC in the paper's form and NeMo's parametrisation.

Conformer: Gulati et al. 2020 (arXiv 2005.08100). Intermediate CTC: Lee & Watanabe 2021;
self-conditioning: Nozaki & Komatsu 2021. Everything that multiplies is an nn.Linear (pointwise
convolutions too), so that every compression method reaches it; modules keep their own widths, so
that a pruned module is built from smaller arguments. A shared block (ALBERT: Lan et al. 2020) is
stored once and runs at several depths; each of these is one of its turns.

Axes: B batch, T frames, D d_model, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.network.attention import PlainAttention, RelPositionAttention, frame_context
from asr.network.parts import LockedDropout, cpu_float, no_cpu_autocast, of_turn, repeated, several
from asr.network.subsampling import ConvSubsampling, TimeReduction
from asr.runtime.config import ModelConfig


class Output(NamedTuple):
    """What a recogniser returns: log-probabilities, their lengths, intermediate CTC outputs."""

    log_probs: Tensor  # (B, T', V) float32
    lengths: Tensor  # (B,) valid frames of log_probs
    intermediate: list[Tensor]  # (B, T', V) after each of config.intermediate_layers, in training


class FeedForward(nn.Module):
    """LayerNorm (as many as `norms`, one a turn), Linear to `hidden`, SiLU, Linear back."""

    def __init__(self, d_model: int, hidden: int, dropout: float, norms: int = 1) -> None:
        super().__init__()
        self.args = {"d_model": d_model, "hidden": hidden, "dropout": dropout, **several(norms)}
        self.norm = repeated(lambda: nn.LayerNorm(d_model), norms)
        self.up = nn.Linear(d_model, hidden)
        self.down = nn.Linear(hidden, d_model)
        self.dropout = LockedDropout(dropout)

    def forward(self, x: Tensor, turn: int = 0) -> Tensor:  # (B, T, D)
        return self.down(self.dropout(F.silu(self.up(of_turn(self.norm, turn)(x)))))


class MaskedBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the valid frames of (B, T, C): padding is never counted."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, T, C), mask (B, T) true at valid frames."""
        assert self.running_mean is not None
        assert self.running_var is not None
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            return x * scale + (self.bias - self.running_mean * scale)
        x = x.float()
        weight = torch.ones_like(x[..., :1]) if mask is None else mask.unsqueeze(-1).float()
        count = weight.sum()
        mean = (x * weight).sum((0, 1)) / count  # (C,)
        centred = (x - mean) * weight
        var = centred.square().sum((0, 1)) / count
        with torch.no_grad():
            unbiased = var * (count / (count - 1).clamp(min=1))
            good = torch.isfinite(mean + unbiased).all()  # a bad batch leaves no trace
            for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                running.copy_(torch.where(good, running.lerp(new, self.momentum or 0.1), running))
        return centred * (torch.rsqrt(var + self.eps) * self.weight) + self.bias


def convolve_frames(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution over the frames of x (B, T, C).

    In PyTorch on a CPU a plain one runs as a 2-D convolution with channels last, the layout that x
    has: with a kernel of 31 five times faster, forward and backward, than as a 1-D convolution.
    """
    x = x.transpose(1, 2)  # (B, C, T)
    if type(conv) is not nn.Conv1d or torch.compiler.is_compiling():
        return conv(x).transpose(1, 2)
    weight, padding = conv.weight.unsqueeze(2), (0, *conv.padding)  # (C, 1, 1, K)
    x = F.conv2d(x.unsqueeze(2), weight, conv.bias, (1, *conv.stride), padding, 1, conv.groups)
    return x.squeeze(2).transpose(1, 2)


class ConvModule(nn.Module):
    """Pointwise Linear with GLU, depthwise convolution, BatchNorm, SiLU, pointwise Linear.

    `norms`: how many LayerNorms, one for each turn; `batch_norms` likewise.
    """

    def __init__(
        self, d_model: int, channels: int, kernel_size: int, norms: int = 1, batch_norms: int = 1
    ) -> None:
        super().__init__()
        self.args = {
            "d_model": d_model, "channels": channels, "kernel_size": kernel_size,
            **several(norms), **several(batch_norms, "batch_norms"),
        }  # fmt: skip
        self.norm = repeated(lambda: nn.LayerNorm(d_model), norms)
        self.up = nn.Linear(d_model, 2 * channels)
        self.depthwise = nn.Conv1d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels
        )
        self.batch_norm = repeated(lambda: MaskedBatchNorm(channels), batch_norms)
        self.down = nn.Linear(channels, d_model)

    def forward(self, x: Tensor, mask: Tensor | None, turn: int = 0) -> Tensor:
        """x (B, T, D), mask (B, T) true at valid frames: padding must not leak into neighbours."""
        x = F.glu(self.up(of_turn(self.norm, turn)(x)), dim=2)  # (B, T, C)
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(2), 0)
        with no_cpu_autocast():
            x = convolve_frames(self.depthwise, cpu_float(x))
        return self.down(F.silu(of_turn(self.batch_norm, turn)(x, mask)))


class ConformerBlock(nn.Module):
    """Half-step feed-forward, self-attention, convolution, half-step feed-forward, LayerNorm.

    A block of several `turns` has statistics of its own (BatchNorm) for each, since what it hears
    differs from depth to depth, and with config.own_norms LayerNorms too.
    """

    def __init__(
        self, config: ModelConfig, d_model: int, plain: bool = False, turns: int = 1
    ) -> None:
        super().__init__()
        d, norms = d_model, turns if config.own_norms else 1
        attention = PlainAttention if plain else RelPositionAttention
        self.ff1 = FeedForward(d, d * config.ff_expansion, config.dropout, norms)
        self.attn = attention(d, config.n_heads, d // config.n_heads, norms)
        self.conv = ConvModule(d, d, config.conv_kernel_size, norms, batch_norms=turns)
        self.ff2 = FeedForward(d, d * config.ff_expansion, config.dropout, norms)
        self.norm = repeated(lambda: nn.LayerNorm(d), norms)
        self.dropout = LockedDropout(config.dropout)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor | None, padding_bias: Tensor | None,
        turn: int = 0,
    ) -> Tensor:  # fmt: skip
        x = x + 0.5 * self.dropout(self.ff1(x, turn))
        x = x + self.dropout(self.attn(x, positions, padding_bias, turn))
        x = x + self.dropout(self.conv(x, mask, turn))
        x = x + 0.5 * self.dropout(self.ff2(x, turn))
        return of_turn(self.norm, turn)(x)


class ConformerCTC(nn.Module):
    """Features (B, T, n_mels) to CTC log-probabilities (B, T', V)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        stages = int(math.log2(config.subsampling_factor))
        self.subsampling = ConvSubsampling(
            config.n_mels, config.d_model, [config.subsampling_channels] * stages,
            separable=config.subsampling == "dw_striding",
        )  # fmt: skip
        self.dropout = LockedDropout(config.dropout)
        stored = config.share_layers or config.n_layers
        position = config.reduction_position
        widths = position * [config.d_model] + (config.n_layers - position) * [config.d_output]
        self.blocks = nn.ModuleList(
            ConformerBlock(
                config, widths[i], plain=i < config.plain_blocks,
                turns=len(range(i, config.n_layers, stored)),
            )
            for i in range(stored)
        )  # fmt: skip
        if position:
            self.reduction = TimeReduction(config.d_model, config.d_output, config.reduction_factor)
        self.head = nn.Linear(config.d_output, config.vocab_size)
        if config.self_conditioned:
            self.conditioning = nn.Linear(config.vocab_size, config.d_output)

    def forward(self, features: Tensor, lengths: Tensor | None = None, behind: int = 0) -> Output:
        """features (B, T, n_mels), lengths (B,) valid frames; None means no padding.

        With `behind` both are what `front` made of them with so many blocks.
        """
        padded = lengths is not None
        if lengths is None:
            lengths = torch.full((features.shape[0],), features.shape[1], device=features.device)
        x, lengths = (features, lengths) if behind else self.stem(features, lengths)
        x, lengths, inner = self.run_blocks(x, lengths, behind, self.config.n_layers, padded)
        return Output(F.log_softmax(self.head(x).float(), dim=2), lengths, inner)

    def front(self, features: Tensor, lengths: Tensor, n_blocks: int) -> tuple[Tensor, Tensor]:
        """What the first `n_blocks` make of the features, (B, T', D)."""
        x, lengths = self.stem(features, lengths)
        x, lengths, _ = self.run_blocks(x, lengths, 0, n_blocks, True)
        return x, lengths

    def front_modules(self, n_blocks: int) -> list[nn.Module]:
        """What `front` runs, none for 0 blocks."""
        return [self.subsampling, *self.blocks[:n_blocks]] if n_blocks else []

    def stem(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, n_mels) to (B, T', D)."""
        x, lengths = self.subsampling(features, lengths)
        return self.dropout(x * math.sqrt(self.config.d_model)), lengths

    def run_blocks(
        self, x: Tensor, lengths: Tensor, start: int, stop: int, padded: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Depths start ... stop - 1 of (B, T', D); what they make, and intermediate CTC outputs."""
        config, intermediate = self.config, []
        context = frame_context(x, lengths, padded)
        for number, (block, turn) in list(enumerate(self.depths(), 1))[start:stop]:
            if number == config.reduction_position + 1 and number > 1:
                x, lengths = self.reduction(x, lengths)
                context = frame_context(x, lengths, padded)
            x = block(x, *context, turn)
            if number in config.intermediate_layers and (self.training or config.self_conditioned):
                log_probs = F.log_softmax(self.head(x).float(), dim=2)
                if self.training:
                    intermediate.append(log_probs)
                if config.self_conditioned:
                    x = x + self.conditioning(log_probs.exp())
        return x, lengths, intermediate

    def depths(self) -> Iterator[tuple[nn.Module, int]]:
        """The blocks in the order in which they run, each with the number of its turn."""
        stored = len(self.blocks)
        for depth in range(self.config.n_layers):
            yield self.blocks[depth % stored], depth // stored


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers in the model."""
    return sum(p.numel() for p in model.parameters())
