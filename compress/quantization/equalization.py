"""Scales moved from a LayerNorm into the Linears that read it, so that these quantise better.

AWQ (Lin et al. 2023, arXiv 2306.00978): input channels of large activations get larger weights,
hence a smaller relative rounding error; the norm is divided by the same factors, so the float model
computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from asr.network.attention import PlainAttention, RelPositionAttention
from asr.network.model import ConvModule, FeedForward
from asr.network.parts import Turns
from compress.core import progress
from compress.quantization import rounding

READERS: dict[type, tuple[str, ...]] = {  # what reads `norm` in each module
    FeedForward: ("up",),
    PlainAttention: ("query", "key", "value"),
    RelPositionAttention: ("query", "key", "value"),
    ConvModule: ("up",),
}
EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)


@torch.no_grad()
def equalize(
    model: nn.Module, grams: dict[str, Tensor], quantized: Callable[[str, Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Rescales norms and Linears in place; returns the Gram matrices of the new inputs.

    `grams` are those of `calibration.input_grams`; a norm whose readers are not all in it stays.
    `quantized(name, weight, importance)` is the approximation (out, in) of a weight. The factors
    are (mean square input) ** (exponent / 2), with the exponent of least output error.
    """
    grams = dict(grams)
    norms = [(name, m) for name, m in model.named_modules() if type(m) in READERS]
    for name, module in progress(norms, "equalization"):
        readers = [f"{name}.{child}" for child in READERS[type(module)]]
        if not all(reader in grams for reader in readers):
            continue
        norm = cast(nn.LayerNorm | Turns, module.norm)
        linears = {reader: cast(nn.Linear, model.get_submodule(reader)) for reader in readers}
        gram = grams[readers[0]]
        power = gram.diagonal().clamp(min=1e-8)
        best, factors = float("inf"), torch.ones_like(power)
        for exponent in EXPONENTS:
            s = power ** (exponent / 2)
            s = s / s.log().mean().exp()
            error = sum(
                rounding.output_error(m.weight, quantized(r, m.weight * s, power / s**2) / s, gram)
                for r, m in linears.items()
            )
            if error < best:
                best, factors = error, s
        for one in norm if isinstance(norm, Turns) else [norm]:
            cast(nn.LayerNorm, one).weight.div_(factors)
            cast(nn.LayerNorm, one).bias.div_(factors)
        for reader, linear in linears.items():
            linear.weight.mul_(factors)
            grams[reader] = gram / torch.outer(factors, factors)
    return grams
