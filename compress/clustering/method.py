"""Weights shared by k-means: each becomes an index into a small codebook.

Deep Compression (Han et al. 2016, arXiv 1510.00149), with one codebook a layer or a few. Where
speech is given, k-means weighs a weight by the mean square of its input, and the error that an
index leaves is passed on to the inputs that correlate (`compress.feedback`). Indices are stored in
log2(num_clusters) bits or entropy-coded, codebooks in fp16; a zero weight stays zero. Fine-tuning
trains the codebooks and leaves the indices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.network import onnx_layers
from asr.network.integers import TableIntegers, look_up
from compress import convolution, core, feedback
from compress.calibration import input_grams, need
from compress.clustering.kmeans import kmeans


@dataclass(frozen=True)
class Config(core.Selection):
    """Options of clustering."""

    num_clusters: int = field(default=256, metadata={"help": "centroids of a codebook, 2 to 256"})
    codebooks: int = field(
        default=1, metadata={"help": "codebooks a layer, each for a part of its outputs"}
    )
    activation_aware: bool = field(
        default=False, metadata={"help": "weigh errors by the inputs on calibration speech"}
    )
    entropy_coding: bool = field(
        default=False, metadata={"help": "store frequent indices in fewer bits"}
    )

    def __post_init__(self) -> None:
        if not 2 <= self.num_clusters <= 256:
            raise ValueError(f"num_clusters {self.num_clusters} must lie in 2..256")
        if self.codebooks < 1:
            raise ValueError(f"codebooks {self.codebooks} must be at least 1")

    @property
    def needs_calibration(self) -> bool:
        return self.activation_aware


class _Clustered(nn.Module):
    """A weight (out, ...) by codebook (codebooks, num_clusters) and indices (out, ...) uint8.

    Codebook i is for the i-th part of the output rows, `rows` each.
    """

    codebook: nn.Parameter
    indices: Tensor
    bias: nn.Parameter | None

    def __init__(self, shape: list[int], args: dict[str, Any]) -> None:
        super().__init__()
        self.args = args
        self.entropy_coding: bool = args["entropy_coding"]
        self.rows = -(-shape[0] // args["codebooks"])
        self.codebook = nn.Parameter(torch.zeros(args["codebooks"], args["num_clusters"]))
        self.register_buffer("indices", torch.zeros(shape, dtype=torch.uint8))
        bias = nn.Parameter(torch.empty(shape[0])) if args["bias"] else None
        self.register_parameter("bias", bias)

    def fill(self, weight: Tensor, bias: Tensor | None, importance: Tensor | None = None) -> None:
        """Computes codebooks and indices; `importance` is broadcast over the weight."""
        for i, part in enumerate(torch.split(weight.detach(), self.rows)):
            of_part = None if importance is None else importance.expand_as(part)
            codebook, indices = kmeans(part, self.codebook.shape[1], of_part)
            self.codebook.data[i] = codebook
            self.indices[i * self.rows : i * self.rows + len(part)] = indices
        if bias is not None:
            self.bias = nn.Parameter(core.round_to_half(bias.detach()))

    def weight(self) -> Tensor:
        """The weight, differentiable in the codebook; a centroid of 0 is not trained."""
        codebook = self.codebook * (self.codebook != 0) if self.training else self.codebook
        indices = self.indices.to(torch.int32)
        if len(codebook) > 1:
            part = torch.arange(len(indices), device=indices.device, dtype=torch.int32) // self.rows
            first = part * codebook.shape[1]
            indices = indices + first.view(-1, *[1] * (indices.dim() - 1))
        return look_up(codebook.flatten(), indices)

    def describe(self) -> str:
        several = f" x {len(self.codebook)}" if len(self.codebook) > 1 else ""
        return f"{self.codebook.shape[1]} clusters{several}"


class ClusteredLinear(_Clustered):
    """y = x @ codebook[indices].T + bias."""

    def __init__(
        self, in_features: int, out_features: int, num_clusters: int, codebooks: int = 1,
        bias: bool = True, entropy_coding: bool = False,
    ) -> None:  # fmt: skip
        args = {
            "in_features": in_features, "out_features": out_features, "num_clusters": num_clusters,
            "codebooks": codebooks, "bias": bias, "entropy_coding": entropy_coding,
        }  # fmt: skip
        super().__init__([out_features, in_features], args)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, config: Config, gram: Tensor | None = None
    ) -> ClusteredLinear:
        """Clusters a weight, for the least error of the outputs to inputs of this Gram matrix."""
        layer = cls(
            linear.in_features, linear.out_features, config.num_clusters,
            min(config.codebooks, linear.out_features), linear.bias is not None,
            config.entropy_coding,
        )  # fmt: skip
        if gram is None:
            layer.fill(linear.weight, linear.bias)
        else:
            layer.fill(linear.weight, linear.bias, gram.diagonal())
            layer.feed_back(linear.weight.detach(), gram)
        return layer

    def feed_back(self, weight: Tensor, gram: Tensor) -> None:
        """Chooses the indices again, the codebooks fixed, by the error of the outputs."""
        if len(gram) > feedback.LARGEST:
            return
        part = torch.arange(len(weight)) // self.rows
        centroids = self.codebook.detach()[part]  # (out, num_clusters), ascending
        middles = (centroids[:, 1:] + centroids[:, :-1]) / 2
        zero = (centroids == 0).int().argmax(1)  # of those that have zeros

        def nearest(j: int, column: Tensor) -> Tensor:
            index = (column[:, None] > middles).sum(1)
            index = torch.where(weight[:, j] == 0, zero, index)
            self.indices[:, j] = index.to(torch.uint8)
            return centroids.gather(1, index[:, None]).squeeze(1)

        feedback.feed_back(weight, gram, nearest)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return F.linear(x, self.weight(), self.bias)

    def onnx_layer(self, compute: str) -> nn.Module:
        """In integers, the codebooks rounded to 8 bits; in float as it is."""
        if compute == "float":
            return self
        weight = TableIntegers(self.indices, self.codebook.detach(), self.rows)
        return onnx_layers.Int8Linear(weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.args['in_features']}, {self.args['out_features']}, {self.describe()}"


class ClusteredConv(_Clustered):
    """A Conv1d or Conv2d with the weight codebook[indices]."""

    def __init__(
        self, num_clusters: int, codebooks: int = 1, entropy_coding: bool = False, **conv: Any
    ) -> None:
        args = {
            "num_clusters": num_clusters, "codebooks": codebooks, "entropy_coding": entropy_coding,
            **conv,
        }  # fmt: skip
        super().__init__(convolution.weight_shape(conv), args)

    @classmethod
    def from_conv(cls, conv: nn.Conv1d | nn.Conv2d, config: Config) -> ClusteredConv:
        layer = cls(
            config.num_clusters, min(config.codebooks, conv.out_channels), config.entropy_coding,
            **convolution.arguments(conv),
        )  # fmt: skip
        layer.fill(conv.weight, conv.bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T) or (B, C, T, F)
        return convolution.convolve(x, self.weight(), self.bias, self.args)

    def onnx_layer(self, compute: str) -> nn.Module:
        """In integers where the products are many, the codebooks rounded to 8 bits."""
        if compute == "float" or not convolution.is_dense(self.args):
            return self
        rows = onnx_layers.rows_of_kernel(self.indices)
        weight = TableIntegers(rows, self.codebook.detach(), self.rows)
        sizes = (self.args[key] for key in ("kernel_size", "stride", "padding"))
        return onnx_layers.Int8Conv2d(weight, self.bias, *map(tuple, sizes))

    def extra_repr(self) -> str:
        return f"{convolution.describe(self.args)}, {self.describe()}"


def apply(
    model: nn.Module, config: Config, calibration: core.Calibration | None = None
) -> nn.Module:
    """Clusters Linears and convolutions, rounds all that is left to fp16."""
    chosen = core.layers(model, config.include, config.exclude, (nn.Linear, *core.CONVOLUTIONS))
    grams: dict[str, Tensor] = {}
    if config.activation_aware:
        names = [name for name, layer in chosen if isinstance(layer, nn.Linear)]
        grams = input_grams(model, need(calibration, "activation_aware"), names)
    for name, layer in core.progress(chosen):
        if isinstance(layer, nn.Linear):
            replacement: nn.Module = ClusteredLinear.from_linear(
                layer, config, grams.pop(name, None)
            )
        else:
            assert isinstance(layer, nn.Conv1d | nn.Conv2d)
            replacement = ClusteredConv.from_conv(layer, config)
        core.replace(model, name, replacement)
    core.round_rest(model)
    return model


def freeze(model: nn.Module, config: Config) -> nn.Module:
    """Rounds trained codebooks, biases and norms to fp16."""
    core.round_rest(model)
    return model
