"""What packed convolutions share: their arguments in JSON types, and the call."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def arguments(conv: nn.Conv1d | nn.Conv2d) -> dict[str, Any]:
    """How to build the convolution anew; a ValueError for dilation and padding other than zeros."""
    if set(conv.dilation) != {1} or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ValueError(f"{conv} cannot be packed: dilation or its kind of padding")
    return {
        "in_channels": conv.in_channels, "out_channels": conv.out_channels,
        "kernel_size": list(conv.kernel_size), "stride": list(conv.stride),
        "padding": list(conv.padding), "groups": conv.groups, "bias": conv.bias is not None,
    }  # fmt: skip


def weight_shape(args: dict[str, Any]) -> list[int]:
    return [args["out_channels"], args["in_channels"] // args["groups"], *args["kernel_size"]]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, args: dict[str, Any]) -> Tensor:
    """The convolution, x (B, C, T) or (B, C, T, F)."""
    conv = F.conv1d if weight.dim() == 3 else F.conv2d
    return conv(x, weight, bias, args["stride"], args["padding"], 1, args["groups"])


def describe(args: dict[str, Any]) -> str:
    kernel = "x".join(str(n) for n in args["kernel_size"])
    return f"{args['in_channels']}, {args['out_channels']}, {kernel}"


def is_dense(args: dict[str, Any]) -> bool:
    """Whether it has many products: two-dimensional, not depthwise, of several channels."""
    return len(args["kernel_size"]) == 2 and args["groups"] == 1 and args["in_channels"] > 1
