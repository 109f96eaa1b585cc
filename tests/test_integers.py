"""Weights for integer products: close to what they stand for, and equal in ONNX Runtime."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from asr.network.integers import LARGEST, GroupedIntegers, Integers, TableIntegers, TernaryIntegers
from asr.network.onnx_layers import Int8Linear
from compress.clustering import ClusteredLinear
from compress.clustering import Config as Clustering
from compress.quantization import rounding

N, K = 24, 80


def weight_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, K, generator=generator) * torch.linspace(0.2, 3, N)[:, None]


def grouped(precision, group_size=32, asymmetric=False):
    values = rounding.grouped(weight_of(), precision, group_size, asymmetric)
    if precision == "ternary":
        weight = TernaryIntegers(values.qweight, values.scale, group_size)
        return weight, rounding.dequantize(*values, group_size)
    middle = -rounding.LIMITS[precision][0]
    zero = None if values.zero_point is None else values.zero_point + middle
    weight = GroupedIntegers(values.qweight + middle, values.scale, group_size, middle, zero)
    return weight, rounding.dequantize(*values, group_size)


def clustered(clusters, codebooks):
    linear = nn.Linear(K, N)
    linear.weight.data = weight_of()
    layer = ClusteredLinear.from_linear(linear, Clustering(num_clusters=clusters,
                                                           codebooks=codebooks))  # fmt: skip
    return TableIntegers(layer.indices, layer.codebook.detach(), layer.rows), layer.weight()


def plain(asymmetric):
    values = rounding.grouped(weight_of(), "int8", K, asymmetric)
    weight = Integers(values.qweight, values.scale, values.zero_point)
    return weight, rounding.dequantize(*values, K)


KINDS = {
    "int8": lambda: plain(False),
    "int8 asymmetric": lambda: plain(True),
    "int4": lambda: grouped("int4"),
    "int4 asymmetric": lambda: grouped("int4", asymmetric=True),
    "int4, groups across blocks": lambda: grouped("int4", 24, asymmetric=True),
    "int4, odd groups": lambda: grouped("int4", 5),
    "int2": lambda: grouped("int2"),
    "int2 asymmetric": lambda: grouped("int2", 16, asymmetric=True),
    "ternary": lambda: grouped("ternary", 64),
    "256 clusters": lambda: clustered(256, 1),
    "256 clusters, 2 codebooks": lambda: clustered(256, 2),
    "16 clusters, 5 codebooks": lambda: clustered(16, 5),
    "12 clusters": lambda: clustered(12, 1),
    "7 clusters": lambda: clustered(7, 1),
}


def value(weight):
    """The weight (N, K) as floats."""
    q = weight().double() - weight.zero.double()
    return (q * weight.scale).float().t()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_rounding_is_at_most_what_eight_bits_cost(kind):
    weight, exact = kind()
    assert weight().shape == (K, N)
    integers = weight().int() - weight.zero.int()
    assert weight().dtype == torch.uint8 or integers.abs().max() <= LARGEST
    # half a step of the product, and for groups half a step of a multiplier of 127, or of 63
    steps = 0.51
    if isinstance(weight, GroupedIntegers):
        steps = 1.02 if weight.halves == 2 else 0.76
    assert (abs(value(weight) - exact) <= steps * weight.scale[:, None]).all()


def test_ternary_groups_cost_no_rounding_but_of_their_scales():
    weight, exact = grouped("ternary", 64)
    assert torch.equal(value(weight) == 0, exact == 0)
    assert torch.equal(weight() != 0, (exact != 0).t())


def test_scales_may_be_negative():
    q, scale = torch.tensor([[0, 15, 8, 3]]), torch.tensor([[-1.0, 0.5]])
    weight = GroupedIntegers(q, scale, 2, 8)
    torch.testing.assert_close(value(weight), torch.tensor([[8.0, -7, 0, -2.5]]), atol=0.1, rtol=0)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_onnxruntime_makes_the_same_integers(kind, tmp_path):
    weight, _ = kind()
    layer = Int8Linear(weight, torch.arange(len(weight.scale)) / 7).eval()
    x = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(1))
    torch.onnx.export(layer, (x,), tmp_path / "layer.onnx", dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "layer.onnx", options, providers=["CPUExecutionProvider"]
    )
    kinds = {node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node}
    folded = {"QLinearConv", "Gather", "Slice", "Transpose", "BitwiseAnd"}
    assert not kinds & folded, "the weight is a constant"
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, layer(x), rtol=1e-5, atol=1e-4)
