"""Conformer-CTC in the paper's form and NeMo's parametrisation.

Conformer: Gulati et al. 2020 (arXiv 2005.08100). Relative positions: Dai et al. 2019. Intermediate
CTC: Lee & Watanabe 2021; self-conditioning: Nozaki & Komatsu 2021. Everything that multiplies is an
nn.Linear (pointwise convolutions too), so that every compression method reaches it; modules keep
their own widths, so that a pruned module is built from smaller arguments. A shared block (ALBERT:
Lan et al. 2020) is stored once and runs at several depths; each of these is one of its turns.

Axes: B batch, T frames, D d_model, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.runtime.config import ModelConfig
from asr.runtime.features import subsampled_length


class Output(NamedTuple):
    """What a recogniser returns: log-probabilities, their lengths, intermediate CTC outputs."""

    log_probs: Tensor  # (B, T', V) float32
    lengths: Tensor  # (B,) valid frames of log_probs
    intermediate: list[Tensor]  # (B, T', V) after each of config.intermediate_layers, in training


def valid_mask(lengths: Tensor, size: int) -> Tensor:
    """(B, size) bool, true where a frame belongs to its utterance."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


def no_cpu_autocast() -> AbstractContextManager[Any]:
    """Leaves autocast on a CPU, where bf16 convolutions and attention products are slow."""
    if torch.is_autocast_enabled("cpu"):
        return torch.autocast("cpu", enabled=False)
    return nullcontext()


def cpu_float(x: Tensor) -> Tensor:
    """float32 on a CPU, unchanged on a GPU."""
    return x.float() if x.device.type == "cpu" else x


class LockedDropout(nn.Module):
    """Dropout with one mask for all frames of an utterance: much cheaper on a CPU, same purpose."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        if not self.training or self.p == 0:
            return x
        keep = torch.empty(x.shape[0], 1, x.shape[2], device=x.device).bernoulli_(1 - self.p)
        return x * (keep / (1 - self.p)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Turns(nn.ModuleList):
    """One module for each turn of a shared block."""


def repeated(module: Callable[[], nn.Module], turns: int) -> nn.Module:
    """The module, or one for each of several turns."""
    return module() if turns == 1 else Turns(module() for _ in range(turns))


def of_turn(module: nn.Module, turn: int) -> nn.Module:
    """The module of that turn; one that serves all turns itself."""
    return module[turn] if isinstance(module, Turns) else module


def several(turns: int, name: str = "norms") -> dict[str, int]:
    """The argument of a module with one norm for each turn; none for a single one."""
    return {name: turns} if turns > 1 else {}


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
