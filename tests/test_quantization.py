"""Quantization against NumPy and onnxruntime's own operators; quantisation-aware training."""

import weakref
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import nn

from asr.network.onnx_layers import dynamic_quantize
from compress.quantization import method as quantization
from compress.quantization import rounding
from compress.quantization.equalization import equalize
from compress.quantization.fakequant import FakeQuantLinear
from compress.quantization.layers import (
    Int8Conv,
    Int8Linear,
    QuantConv,
    QuantLinear,
    quantized_conv,
)

PRECISIONS = [("int8", 0), ("int4", 32), ("int2", 32), ("ternary", 64)]


def weights(out_features=24, in_features=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out_features, in_features, generator=generator) ** 3


def linear_of(weight, bias=True):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    linear.weight.data = weight.clone()
    return linear


def onnx_session(nodes, inputs, outputs, constants):
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in inputs],
        [helper.make_tensor_value_info(n, t, None) for n, t in outputs],
        [onnx.numpy_helper.from_array(v, n) for n, v in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return onnxruntime.InferenceSession(model.SerializeToString())


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(50, 7),
        torch.rand(50, 7) + 3,
        -torch.rand(50, 7) - 3,
        torch.zeros(3, 2),
        torch.arange(-255, 256).float().view(-1, 1) / 2,
        torch.full((2, 2), 1e-20),
    ],
    ids=["both signs", "positive", "negative", "zero", "halves", "tiny"],
)
def test_dynamic_quantize_is_that_of_onnxruntime(x):
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    types = [("q", TensorProto.UINT8), ("s", TensorProto.FLOAT), ("z", TensorProto.UINT8)]
    q, scale, zero = onnx_session([node], ["x"], types, {}).run(None, {"x": x.numpy()})
    ours = dynamic_quantize(x)
    assert np.array_equal(ours[0].numpy(), q)
    assert ours[1].item() == scale
    assert ours[2].item() == zero


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("in_features", [30, 1536])
def test_int8_product_is_exact(in_features, asymmetric):
    weight = weights(16, in_features)
    quantized = rounding.grouped(weight, "int8", in_features, asymmetric)
    layer = Int8Linear.from_values(quantized, torch.zeros(16), "int8", in_features).eval()
    x = torch.rand(3, 5, in_features) * 4 - 1
    values, x_scale, x_zero = dynamic_quantize(x)
    q = values.reshape(15, -1).numpy().astype(np.int64) - int(x_zero)
    centred = layer.qweight.long() - (layer.zero_point.long() if asymmetric else 0)
    scales = (x_scale * layer.scale.t()).numpy()
    exact = (q @ centred.numpy().T).astype(np.float32) * scales
    assert np.array_equal(layer(x).detach().numpy().reshape(15, -1), exact)
    close = F.linear(x, layer.weight())
    assert torch.allclose(layer(x), close, atol=float(x_scale) * weight.abs().sum(1).max())


def test_int8_weights_against_numpy():
    weight = weights()
    values = rounding.grouped(weight, "int8", 80)
    w = weight.numpy()
    largest = np.abs(w).max(1, keepdims=True)
    scale = (largest / np.float32(127)).astype(np.float16).astype(np.float32)
    assert np.array_equal(values.scale.numpy(), scale)
    assert np.array_equal(values.qweight.numpy(), np.clip(np.rint(w / scale), -127, 127))


@pytest.mark.parametrize(("precision", "group_size"), PRECISIONS)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("in_features", [64, 80, 7])
def test_layer_computes_its_own_weight(precision, group_size, asymmetric, in_features):
    if asymmetric and precision in ("int2", "ternary"):
        pytest.skip("int2 is always asymmetric, ternary never")
    size = group_size or in_features
    weight = weights(12, in_features)
    values = rounding.grouped(weight, precision, size, asymmetric)
    low, high = rounding.limits(precision, asymmetric)
    assert low <= values.qweight.min()
    assert values.qweight.max() <= high
    assert values.scale.shape == (12, -(-in_features // size))
    assert torch.equal(values.scale, values.scale.half().float())
    zero = 0 if values.zero_point is None else values.zero_point.float().repeat_interleave(size, 1)
    scale = values.scale.repeat_interleave(size, 1)[:, :in_features]
    zero = zero if isinstance(zero, int) else zero[:, :in_features]
    layer = QuantLinear.from_values(values, torch.ones(12), precision, size)
    assert torch.equal(layer.weight(), (values.qweight.float() - zero) * scale)
    x = torch.randn(2, 3, in_features)
    assert torch.allclose(layer(x), x @ layer.weight().T + 1, atol=1e-5)
    empty = QuantLinear(**layer.args)
    empty.load_state_dict(layer.state_dict(), strict=True, assign=True)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("importance", [None, torch.linspace(0.1, 3, 64)])
def test_ternary_is_the_best_there_is(importance):
    weight = weights(6, 64)
    values = rounding.grouped(weight, "ternary", 64, importance=importance)
    h = np.ones(64) if importance is None else importance.numpy().astype(np.float64)
    for row, q, scale in zip(weight.numpy(), values.qweight.numpy(), values.scale, strict=True):
        ours = (h * (row - q * scale.item()) ** 2).sum()
        best = np.inf
        for k in range(1, 65):  # every threshold, with its best scale
            t = np.sign(row) * (np.abs(row) >= np.sort(np.abs(row))[-k])
            s = (h * t * row).sum() / (h * np.abs(t)).sum()
            best = min(best, (h * (row - s * t) ** 2).sum())
        assert ours == pytest.approx(best, rel=2e-3)


def test_int4_search_is_near_a_fine_one():
    weight = weights(8, 32)
    values = rounding.grouped(weight, "int4", 32)
    for row, error in zip(
        weight.numpy(),
        (weight - rounding.dequantize(*values, 32)).square().sum(1).numpy(),
        strict=True,
    ):
        scales = np.linspace(-1, 1, 4001) * np.abs(row).max() / 6
        scales = scales[np.abs(scales) > 0.05 * np.abs(scales).max(), None]
        fine = ((row - np.clip(np.rint(row / scales), -8, 7) * scales) ** 2).sum(1).min()
        plain = np.abs(row).max() / 7
        assert error <= 1.08 * fine
        assert error <= ((row - np.clip(np.rint(row / plain), -8, 7) * plain) ** 2).sum() + 1e-6


@pytest.mark.parametrize(("precision", "group_size"), PRECISIONS)
def test_zeros_stay_zero(precision, group_size):
    weight = weights() * (torch.rand(24, 80) < 0.5)
    gram = torch.eye(80) + 0.3
    for asymmetric in (False, True) if precision in ("int8", "int4") else (False,):
        size = group_size or 80
        for values in (
            rounding.grouped(weight, precision, size, asymmetric),
            rounding.compensated(weight, precision, size, asymmetric, gram),
        ):
            assert (rounding.dequantize(*values, size)[weight == 0] == 0).all()


@pytest.mark.parametrize(("precision", "group_size"), PRECISIONS)
@pytest.mark.parametrize("weight", [torch.zeros(3, 70), torch.full((3, 70), 1e-9)])
def test_rows_too_small_for_fp16_scales(precision, group_size, weight):
    values = rounding.grouped(weight, precision, group_size or 70)
    assert torch.isfinite(rounding.dequantize(*values, group_size or 70)).all()


def correlated_inputs(n=4000, size=64):
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(size, size, generator=generator) * torch.logspace(1, -1, size)
    return torch.randn(n, size, generator=generator) @ mix


@pytest.mark.parametrize("importance", [None, torch.linspace(0.1, 3, 32)])
def test_int2_search_is_near_a_fine_one(importance):
    """Four values around zero or with zero among them, whichever is nearer, by any scale."""
    weight = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    weight[:4] = weight[:4] ** 3
    weight[8:] = weight[8:].abs()
    values = rounding.grouped(weight, "int2", 32, importance=importance)
    assert set(values.zero_point.unique().tolist()) == {-0.5, 0.0}
    h = np.ones(32) if importance is None else importance.numpy().astype(np.float64)
    approximation = rounding.dequantize(*values, 32).numpy()
    for row, ours in zip(weight.numpy(), approximation, strict=True):
        scales = np.linspace(-1.2, 1.2, 2400)[:, None] * np.abs(row).max()
        tried = [
            (np.clip(np.rint(row / scales + zero), -2, 1) - zero) * scales for zero in (-0.5, 0)
        ]
        fine = min((h * (row - w) ** 2).sum(1).min() for w in tried)
        assert (h * (row - ours) ** 2).sum() <= 1.06 * fine


@pytest.mark.parametrize("precision", ["int4", "int2", "ternary"])
def test_error_feedback_lowers_the_output_error(precision):
    x, weight = correlated_inputs(), weights(32, 64)
    gram = x.T @ x / len(x)
    plain = rounding.dequantize(*rounding.grouped(weight, precision, 32), 32)
    better = rounding.dequantize(*rounding.compensated(weight, precision, 32, False, gram), 32)
    errors = [(x @ (weight - w).T).square().mean().item() for w in (plain, better)]
    assert errors[1] < (0.6 if precision == "int4" else 0.75) * errors[0]
    ours = rounding.output_error(weight, plain, gram)
    assert ours / 32 == pytest.approx(errors[0], rel=1e-3)


@pytest.mark.parametrize("precision", ["int4", "int2", "ternary"])
def test_error_feedback_knows_of_pruned_weights(precision):
    """A weight that stays zero leaves its whole value as the error, not what rounding would."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4000, 128, generator=generator) + 0.5 * torch.randn(4000, 1)
    weight = weights(64, 128)
    weight[weight.abs() < weight.abs().median()] = 0
    gram = x.T @ x / len(x)
    plain = rounding.dequantize(*rounding.grouped(weight, precision, 64), 64)
    better = rounding.dequantize(*rounding.compensated(weight, precision, 64, False, gram), 64)
    errors = [rounding.output_error(weight, w, gram) for w in (plain, better)]
    assert errors[1] < 0.97 * errors[0]


def test_equalization_changes_no_output_and_helps():
    from asr.network.model import FeedForward

    torch.manual_seed(0)
    module = nn.Sequential(FeedForward(64, 96, 0.0)).eval()
    ff = module[0]
    ff.norm.weight.data = torch.logspace(-1, 1, 64)
    x = torch.randn(200, 64)
    seen = ff.norm(x).detach()
    gram = seen.T @ seen / len(seen)
    before, weight = module(x).detach(), ff.up.weight.detach().clone()

    def quantized(name, w, h):
        return rounding.dequantize(*rounding.grouped(w, "int4", 32, importance=h), 32)

    grams = equalize(module, {"0.up": gram}, quantized)
    assert torch.allclose(module(x), before, atol=1e-4)
    now = ff.norm(x).detach()
    assert torch.allclose(grams["0.up"], now.T @ now / len(now), rtol=1e-3, atol=1e-3)
    plain = rounding.output_error(weight, quantized("", weight, gram.diagonal()), gram)
    h = grams["0.up"].diagonal()
    after = rounding.output_error(ff.up.weight, quantized("", ff.up.weight, h), grams["0.up"])
    assert after < plain


@pytest.mark.parametrize(
    ("conv", "kind"),
    [
        (nn.Conv2d(1, 6, 3, 2, 1), QuantConv),
        (nn.Conv2d(6, 8, 3, 2, 1), Int8Conv),
        (nn.Conv2d(6, 8, (3, 2), (1, 2), (1, 0), bias=False), Int8Conv),
        (nn.Conv2d(6, 6, 3, 2, 1, groups=6), QuantConv),
        (nn.Conv1d(6, 6, 7, padding=3, groups=6), QuantConv),
    ],
)
def test_convolutions(conv, kind):
    layer = quantized_conv(conv).eval()
    assert type(layer) is kind
    shape = (
        (2, conv.in_channels, 21) if isinstance(conv, nn.Conv1d) else (2, conv.in_channels, 21, 9)
    )
    x = torch.randn(shape)
    expected = type(conv).forward(conv, x)
    assert layer(x).shape == expected.shape
    assert (layer(x) - expected).norm() < 0.02 * expected.norm()
    if kind is Int8Conv:
        values, x_scale, x_zero = dynamic_quantize(x)
        centred = values.double() - x_zero
        a = layer.args
        exact = F.conv2d(centred, layer.qweight.double(), None, a["stride"], a["padding"])
        exact = exact.float() * (x_scale * layer.scale).view(-1, 1, 1)
        exact = exact if layer.bias is None else exact + layer.bias.view(-1, 1, 1)
        assert torch.allclose(layer(x), exact, rtol=1e-6, atol=1e-7)
    empty = kind(**layer.args)
    empty.load_state_dict(layer.state_dict(), strict=True, assign=True)
    assert torch.equal(empty.eval()(x), layer(x))


def test_convolutions_that_cannot_be_packed_are_refused():
    with pytest.raises(ValueError, match="dilation"):
        quantized_conv(nn.Conv1d(4, 4, 3, dilation=2))


@pytest.mark.parametrize(("precision", "group_size"), PRECISIONS)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_training_sees_what_is_stored(precision, group_size, asymmetric):
    if asymmetric and precision in ("int2", "ternary"):
        pytest.skip("int2 is always asymmetric, ternary never")
    torch.manual_seed(0)
    size = group_size or 80
    linear = nn.Linear(80, 24)
    values = rounding.grouped(linear.weight.detach(), precision, size, asymmetric)
    model = nn.Sequential(FakeQuantLinear.from_values(linear, values, precision, size))
    fake = model[0]
    target = nn.Linear(80, 24)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        x = torch.randn(64, 80)
        loss = (model(x) - target(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    trained, seen = fake.quantized_weight().detach(), model(x).detach()
    quantization.freeze(model.eval(), quantization.Config(precision=precision))
    assert isinstance(model[0], Int8Linear if precision == "int8" else QuantLinear)
    assert torch.equal(model[0].weight(), trained)
    assert torch.allclose(model[0](x), seen, atol=1e-4)


def test_scale_gradient_is_that_of_lsq():
    linear = linear_of(weights(4, 32))
    values = rounding.grouped(linear.weight.detach(), "int4", 32)
    fake = FakeQuantLinear.from_values(linear, values, "int4", 32)
    fake.quantized_weight().sum().backward()
    w, s = linear.weight.detach().numpy(), values.scale.numpy()
    x = w / s
    inside = (x > -8) & (x < 7)
    per_weight = np.where(inside, np.rint(x) - x, np.clip(x, -8, 7))
    expected = per_weight.sum(1) * s[:, 0]
    assert np.allclose(fake.own.gain.grad.numpy(), expected, rtol=1e-3, atol=1e-3)
    assert np.array_equal(fake.weight.grad.numpy() != 0, inside)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int3"}, "int3"),
        ({"precision": "ternary", "asymmetric": True}, "asymmetric"),
        ({"precision": "int2", "asymmetric": True}, "asymmetric"),
        ({"precision": "int2", "group_size": 512}, "one of 16, 32, 64, 128, 256"),
        ({"precision": "int8", "group_size": 32}, "group_size"),
        ({"precision": "int4", "group_size": -1}, "group_size"),
        ({"precision": "int4", "group_size": 48}, "one of 16, 32, 64, 128, 256"),
        ({"precision": "ternary", "group_size": 32}, "one of 64"),
        ({"precision": "int8", "activation_aware": True}, "activation_aware"),
        ({"ends": "int4"}, "ends"),
        ({"precision": "int2", "co_training": "int8,int2"}, "'int2' beside int2"),
        ({"precision": "int4", "co_training": "fp16"}, "not one of int8, int2, ternary"),
        ({"precision": "int8", "co_training": "int4"}, "co_training is for"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        quantization.Config(**options)


def test_a_layer_is_freed_once_it_is_replaced(monkeypatch):
    """A large model's floats and its integers are never all in memory."""
    model = nn.Sequential(*(linear_of(weights(seed=i)) for i in range(4)))
    old = [weakref.ref(layer) for layer in model]
    alive = []

    def replace(*given):
        alive.append(sum(layer() is not None for layer in old))
        core.replace(*given)

    core = quantization.core
    monkeypatch.setattr(quantization, "core", SimpleNamespace(**vars(core) | {"replace": replace}))
    quantization.apply(model, quantization.Config())
    assert alive == [4, 3, 2, 1]


@pytest.mark.parametrize(("precision", "group_size"), PRECISIONS[1:])
def test_training_begins_with_the_integers_that_were_chosen(precision, group_size):
    """Those of error feedback are often not the nearest to the weights."""
    x, linear = correlated_inputs(), linear_of(weights(32, 64))
    weight, gram = linear.weight.detach(), x.T @ x / len(x)
    values = rounding.compensated(weight, precision, group_size, precision == "int2", gram)
    low, high = rounding.limits(precision, False)
    nearest = rounding.to_integers(weight, *values[1:], group_size, low, high)
    assert not torch.equal(nearest.to(torch.int8), values.qweight)
    fake = FakeQuantLinear.from_values(linear, values, precision, group_size)
    assert torch.equal(fake.quantized().qweight, values.qweight)
    same = nearest.to(torch.int8) == values.qweight
    assert torch.equal(fake.weight[same], weight[same])
    assert ((fake.weight - weight).abs() <= 1.01 * (fake.quantized_weight() - weight).abs()).all()


def test_co_training_takes_turns_and_stores_its_own_precision():
    torch.manual_seed(0)
    linear = linear_of(weights(24, 80))
    weight = linear.weight.detach()
    values = rounding.grouped(weight, "ternary", 64)
    fake = FakeQuantLinear.from_values(linear, values, "ternary", 64, ["int8", "int2"])
    expected = {
        name: rounding.dequantize(*rounding.grouped(weight, *kind), kind[1])
        for name in ("ternary", "int8", "int2")
        for kind in [rounding.standard(name, 80)]
    }
    counts = dict.fromkeys(expected, 0)
    fake.train()
    for _ in range(200):
        seen = fake.quantized_weight()
        (name,) = [n for n, w in expected.items() if torch.allclose(seen, w, atol=1e-6)]
        counts[name] += 1
    assert 70 < counts["ternary"] < 130
    assert min(counts["int8"], counts["int2"]) > 25
    loss = sum(fake(torch.randn(4, 80)).square().sum() for _ in range(40))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fake.parameters())
    empty = FakeQuantLinear(**fake.args)
    empty.load_state_dict(fake.state_dict(), strict=True, assign=True)
    fake.eval()
    x = torch.randn(3, 80)
    assert torch.equal(empty.eval()(x), fake(x))
    assert all(torch.equal(fake.quantized_weight(), expected["ternary"]) for _ in range(10))
    model = nn.Sequential(fake)
    quantization.freeze(model, quantization.Config(precision="ternary"))
    assert torch.equal(model[0].weight(), expected["ternary"])
