"""Weights as integers times scales, or every number as fp16.

`method` has the options; `rounding` chooses the integers, `equalization` prepares weights for
them, `fakequant` trains with them, `layers` stores them and computes.
"""

from compress.quantization.fakequant import FakeQuantLinear
from compress.quantization.layers import Int8Conv, Int8Linear, QuantConv, QuantLinear
from compress.quantization.method import (
    Config,
    apply,
    check,
    freeze,
    learning_rate_share,
    prepare,
    why_kept,
)

__all__ = [
    "Config", "FakeQuantLinear", "Int8Conv", "Int8Linear", "QuantConv", "QuantLinear",
    "apply", "check", "freeze", "learning_rate_share", "prepare", "why_kept",
]  # fmt: skip
