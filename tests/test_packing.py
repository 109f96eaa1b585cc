"""Packed storage: nothing changes, and every form takes the bytes that arithmetic says."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from compress import packing


@pytest.mark.parametrize("base", [2, 3, 4, 5, 6, 7, 16, 17, 256])
@pytest.mark.parametrize("count", [1, 4, 5, 1001])
def test_digits_return(base, count):
    values = torch.randint(base, (count,), generator=torch.Generator().manual_seed(0))
    packed = packing.pack_digits(values, base)
    assert packed.dtype == torch.uint8
    assert len(packed) == math.ceil(count / packing.digits_per_byte(base))
    assert torch.equal(packing.unpack_digits(packed, base, count), values)


def test_five_ternary_digits_in_a_byte():
    assert packing.digits_per_byte(3) == 5
    assert packing.pack_digits(torch.tensor([2, 2, 2, 2, 2]), 3).tolist() == [242]
    assert packing.pack_digits(torch.tensor([0, 1]), 3).tolist() == [3]


def test_two_int4_in_a_byte_the_first_lowest():
    assert packing.pack_digits(torch.tensor([1, 15, 7]), 16).tolist() == [1 + 16 * 15, 7]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 1003])
def test_bits_return(bits, count):
    values = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(1))
    packed = packing.pack_bits(values, bits)
    assert len(packed) == math.ceil(count * bits / 8)
    assert torch.equal(packing.unpack_bits(packed, bits, count), values.to(torch.uint8))


def test_bits_follow_one_another_from_the_lowest():
    packed = packing.pack_bits(torch.tensor([0b101, 0b011, 0b110]), 3)
    assert packed.tolist() == [0b10_011_101, 0b1]


def random(dtype, shape, zeros=0.0):
    generator = torch.Generator().manual_seed(2)
    if dtype.is_floating_point:
        x = torch.randn(shape, generator=generator).to(dtype)
    else:
        high = 2 if dtype == torch.bool else 100
        x = torch.randint(0, high, shape, generator=generator).to(dtype)
    x[torch.rand(shape, generator=generator) < zeros] = 0
    return x


@pytest.mark.parametrize("dtype", packing.DTYPES.values(), ids=packing.DTYPES.keys())
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (9, 5, 3)])
@pytest.mark.parametrize("zeros", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("entropy_coding", [False, True])
def test_every_tensor_returns(dtype, shape, zeros, entropy_coding):
    x = random(dtype, shape, zeros)
    back = packing.decode(*packing.encode(x, entropy_coding))
    assert back.dtype == dtype
    assert back.shape == x.shape
    assert torch.equal(back, x)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-30, 65520.0, 2**-25])
def test_values_beyond_fp16_return(value):
    x = torch.tensor([0.5, value, -0.0])
    back = packing.decode(*packing.encode(x))
    assert torch.equal(back.view(torch.int32)[:2], x.view(torch.int32)[:2])


@pytest.mark.parametrize(
    ("x", "bits"),
    [
        (torch.randn(8000), 32),
        (torch.randn(8000).half().float(), 16),
        (random(torch.float32, (8000,), 0.3), 1 + 0.7 * 32),
        (random(torch.float32, (8000,), 0.5), 1 + 0.5 * 32),
        (torch.randint(-127, 128, (8000,)).to(torch.int8), 8),
        (torch.randint(-8, 8, (8000,)).to(torch.int8), 4),
        (torch.randint(-1, 2, (8000,)).to(torch.int8), 1.6),
        (torch.randint(0, 8, (8000,)).to(torch.uint8), 3),
        (torch.randint(0, 256, (8000,)).to(torch.uint8), 8),
    ],
    ids=["float", "half", "30 %", "50 %", "int8", "int4", "ternary", "3 bits", "8 bits"],
)
def test_bytes_are_what_arithmetic_says(x, bits):
    _, data = packing.encode(x)
    assert len(data) == pytest.approx(len(x) * bits / 8, rel=0.02)


def test_sparse_int8_takes_a_mask_and_the_survivors():
    x = torch.randint(1, 128, (8000,)).to(torch.int8) * torch.randint(-1, 2, (8000,)).sign()
    x = (x * (torch.arange(8000) % 2)).to(torch.int8)
    survivors = int((x != 0).sum())
    assert packing.stored_bytes({"x": x}) == 1000 + survivors


def test_entropy_coding_comes_near_the_entropy():
    p = np.array([0.5, 0.25] + [0.25 / 14] * 14)
    x = torch.from_numpy(np.random.default_rng(0).choice(16, 20_000, p=p).astype(np.uint8))
    entropy = -(p * np.log2(p)).sum() / 8 * len(x)
    coded = packing.stored_bytes({"x": x}, entropy_coding=True)
    assert entropy * 0.99 < coded < entropy * 1.05
    assert coded < packing.stored_bytes({"x": x})


def test_a_plain_state_is_stored_as_it_is():
    model = nn.Linear(20, 30)
    assert packing.pack_state(model).keys() == model.state_dict().keys()
    assert packing.unpack_state(packing.pack_state(model)).keys() == model.state_dict().keys()


def test_a_packed_state_returns_and_names_stay():
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30))
    model[0].weight.data[:, ::2] = 0
    stored = packing.pack_state(model)
    assert stored.keys() == {"index", "bytes"}
    state = packing.unpack_state(stored)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("part", ["index", "bytes"])
def test_damage_is_a_value_error(part):
    model = nn.Linear(20, 30)
    model.weight.data[:] = 0
    stored = packing.pack_state(model)
    stored[part] = stored[part][:-20]
    with pytest.raises(ValueError, match=r"damaged|end early"):
        packing.unpack_state(stored)
