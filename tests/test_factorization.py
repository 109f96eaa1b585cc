"""Low-rank factorization against NumPy, the choice of ranks, and its errors."""

import numpy as np
import pytest
import torch
from torch import nn

from asr.network.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from asr.network.model import ConformerCTC
from asr.runtime.config import ModelConfig
from asr.runtime.tokenizer import ENGLISH, Tokenizer
from asr.training.data import Batch
from compress import allocation
from compress.calibration import input_moments
from compress.core import Calibration, UnchangedError
from compress.factorization import method as factorization
from compress.factorization.method import Config, LowRankLinear, apply
from compress.quantization import method as quantization
from compress.recipes import make_step


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=32, n_layers=2, n_heads=2, conv_kernel_size=7, subsampling_channels=16
    )
    return ConformerCTC(config).eval()


def calibration(count=4, frames=120):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([frames - 10 * i for i in range(count)])
    features = torch.randn(count, frames, 80, generator=generator)
    targets = torch.randint(1, 29, (count, 5), generator=generator)
    return Calibration(
        [Batch(features, lengths, targets, torch.full((count,), 5), tuple(range(count)), 1.0)]
    )


class Host(nn.Module):
    """A model of one Linear, which sees the features."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, features):
        return self.linear(features)


def batch_of(x):
    return Batch(x[None], torch.tensor([len(x)]), torch.ones(1, 1), torch.ones(1), (0,), 1.0)


@pytest.mark.parametrize("rank", [1, 5, 19])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_plain_error_is_that_of_eckart_and_young(rank, shape):
    linear = nn.Linear(shape[1], shape[0])
    layer = LowRankLinear.from_linear(linear, rank)
    weight = linear.weight.detach().numpy().astype(np.float64)
    product = (layer.up.weight @ layer.down.weight).detach().numpy()
    s = np.linalg.svd(weight, compute_uv=False)
    assert np.linalg.norm(weight - product) == pytest.approx(
        np.sqrt((s[rank:] ** 2).sum()), rel=1e-5
    )
    assert torch.equal(layer.up.bias, linear.bias)


def test_full_rank_is_the_same_layer():
    linear = nn.Linear(24, 40)
    x = torch.randn(3, 7, 24)
    layer = LowRankLinear.from_linear(linear, 24)
    torch.testing.assert_close(layer(x), linear(x), atol=1e-5, rtol=1e-5)
    assert LowRankLinear.from_linear(nn.Linear(24, 40, bias=False), 3).up.bias is None


def random_gram(size):
    root = torch.randn(size, size) @ torch.diag(torch.logspace(0, -1, size))
    return root @ root.t()


def root(gram):
    values, vectors = np.linalg.eigh(gram.double().numpy())
    return (vectors * np.sqrt(values)) @ vectors.T


@torch.no_grad()
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_weighted_error_is_the_least_there_is(shape, monkeypatch):
    """NumPy: by Eckart and Young, of the weight between symmetric roots of both matrices."""
    monkeypatch.setattr(factorization, "DAMPING", 0.0)
    torch.manual_seed(0)
    linear, g, c = nn.Linear(shape[1], shape[0]), random_gram(shape[0]), random_gram(shape[1])
    w, g, c = linear.weight.double(), g.double(), c.double()
    thin = (c, w.t() @ g @ w) if shape[0] > shape[1] else (w @ c @ w.t(), g)
    parts = factorization.principal_components(linear.weight, *thin)
    s = np.linalg.svd(root(g) @ linear.weight.numpy() @ root(c), compute_uv=False)
    for rank in (1, 4, 11):
        layer = LowRankLinear.from_linear(linear, rank, parts)
        d = linear.weight - layer.up.weight @ layer.down.weight
        error = float(torch.trace(g @ d.double() @ c @ d.double().t()))
        assert error == pytest.approx((s[rank:] ** 2).sum(), rel=1e-3)
        assert error == pytest.approx(float(parts.energy[rank:].sum()), rel=1e-3)


def test_a_gram_that_rounding_left_indefinite_keeps_its_large_part():
    vectors = torch.linalg.qr(torch.randn(4, 4)).Q.double()
    values = torch.tensor([100.0, 2.0, 1.0, -0.5]).double()
    lower = factorization._root(vectors * values @ vectors.t(), 4)
    values[3] = factorization.DAMPING * values.mean()
    torch.testing.assert_close(lower @ lower.t(), vectors * values @ vectors.t())
    assert torch.equal(lower, lower.tril())


@torch.no_grad()
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_activation_aware_has_the_least_output_error(shape):
    """NumPy: the principal components of centred outputs, no other map of that rank does better."""
    rng = np.random.default_rng(0)
    out, inside = shape
    inputs = rng.standard_normal((500, inside)) @ rng.standard_normal((inside, inside)) + 2.0
    linear = nn.Linear(inside, out)
    weight = linear.weight.detach().numpy().astype(np.float64)
    x = torch.from_numpy(inputs.astype(np.float32))
    maps = {} if out > inside else {"linear": linear.weight.t()}
    moments = input_moments(Host(linear), Calibration([batch_of(x)]), ["linear"], maps)
    parts = factorization.components(linear, moments["linear"], None)
    for rank in (1, 4, 11):
        layer = LowRankLinear.from_linear(linear, rank, parts)
        error = float((layer(x) - linear(x)).square().sum(1).mean())
        outputs = inputs @ weight.T
        variances = np.linalg.eigvalsh(np.cov(outputs.T, bias=True))[::-1]
        assert error == pytest.approx(variances[rank:].sum(), rel=2e-2)
        plain = LowRankLinear.from_linear(linear, rank)
        assert error < float((plain(x) - linear(x)).square().sum(1).mean())


def test_moments_leave_padding_out(model):
    speech = calibration()
    names = ["blocks.1.ff2.down"]
    seen = input_moments(model, speech, names)[names[0]]
    batch = speech.batches[0]
    speech.batches[0].features[1:, 110:] = 99.0  # beyond the length of all but the first
    again = input_moments(model, Calibration([batch]), names)[names[0]]
    torch.testing.assert_close(seen.gram, again.gram)
    torch.testing.assert_close(seen.mean, again.mean)


def test_rank_replaces_what_shrinks_and_names_the_rest(model):
    before = sum(p.numel() for p in model.parameters())
    apply(model, Config(rank=20))
    assert isinstance(model.blocks[0].ff1.up, LowRankLinear)
    assert type(model.blocks[0].attn.query) is nn.Linear  # 32 x 32: smaller below rank 16 only
    assert "rank 16" in model.blocks[0].attn.query.kept
    assert sum(p.numel() for p in model.parameters()) < before


def test_a_rank_that_shrinks_nothing_names_the_largest_useful_one(model):
    with pytest.raises(UnchangedError, match=r"largest useful rank is 29 \(subsampling.out\)"):
        apply(model, Config(rank=200))
    apply(model, Config(rank=29))
    assert sum(isinstance(m, LowRankLinear) for m in model.modules()) == 1


@pytest.mark.parametrize("energy", [0.5, 0.8])
def test_energy_keeps_that_share_of_every_layer(model, energy):
    weights = {
        n: m.weight.detach().clone() for n, m in model.named_modules() if type(m) is nn.Linear
    }
    apply(model, Config(energy=energy))
    for name, layer in model.named_modules():
        if isinstance(layer, LowRankLinear):
            s = np.linalg.svd(weights[name].numpy(), compute_uv=False) ** 2
            kept = s[: layer.args["rank"]].sum() / s.sum()
            assert kept >= energy - 1e-6
            assert layer.args["rank"] % 8 == 0 or layer.args["rank"] < 8


def test_energy_of_everything_shrinks_nothing(model):
    with pytest.raises(UnchangedError, match=r"energy 1.0 makes no layer smaller"):
        apply(model, Config(energy=1.0))


@pytest.mark.parametrize("aware", [False, True])
def test_size_ratio_is_reached_and_not_overshot(model, tmp_path, aware):
    with torch.no_grad():
        for tensor in model.state_dict().values():  # no zeros and ones, which take less
            if tensor.is_floating_point():
                tensor += 0.01 * torch.rand_like(tensor)
    tokenizer = Tokenizer.characters(ENGLISH)
    save_checkpoint(tmp_path / "a.pt", Checkpoint(model, tokenizer))
    apply(model, Config(size_ratio=1.5, activation_aware=aware), calibration())
    save_checkpoint(tmp_path / "b.pt", Checkpoint(model, tokenizer))
    ratio = (tmp_path / "a.pt").stat().st_size / (tmp_path / "b.pt").stat().st_size
    assert 1.49 < ratio < 1.6


def test_size_ratio_out_of_reach(model):
    with pytest.raises(ValueError, match="out of reach"):
        apply(model, Config(size_ratio=30.0))


def test_reloads_equal_and_composes_with_quantization(model, tmp_path):
    apply(model, Config(rank=6))
    quantization.apply(model, quantization.Config(precision="int8"))
    assert type(model.blocks[0].ff1.up.down).__name__ == "Int8Linear"
    save_checkpoint(tmp_path / "a.pt", Checkpoint(model, Tokenizer.characters(ENGLISH)))
    again = load_checkpoint(tmp_path / "a.pt").model
    x = torch.randn(1, 100, 80)
    assert torch.equal(model(x).log_probs, again(x).log_probs)
    with pytest.raises(ValueError, match="already replaced"):
        apply(again, Config(rank=6))


def test_activation_aware_needs_speech(model):
    with pytest.raises(ValueError, match="--calibration_data"):
        apply(model, Config(rank=6, activation_aware=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 3, "energy": 0.5}, {"rank": -1}, {"energy": 1.5}, {"size_ratio": 0.9}],
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=r"takes one of|must"):
        Config(**options)


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"energy": 0.0}, {"energy": 0}, {"size_ratio": 1.0}, {"rank": -2}]
)
def test_nothing_given_is_not_nought_given(options):
    """Where 0 stands for no choice, choosing it is a mistake of its own."""
    (key, value), *_ = options.items()
    with pytest.raises(ValueError, match=rf"{key} {value} is out of range: it must be above"):
        make_step("factorization", options)
    with pytest.raises(ValueError, match="takes one of rank"):
        make_step("factorization", {})


def test_allocation_is_optimal_for_small_cases():
    rng = np.random.default_rng(0)
    for _ in range(30):
        sizes = [np.array([1.0, 2.0, 4.0]) for _ in range(4)]
        losses = [np.sort(rng.random(3))[::-1] * scale for scale in (1, 2, 4, 8)]
        choice = allocation.allocate(sizes, losses, 9.0)
        total = sum(s[j] for s, j in zip(sizes, choice, strict=True))
        loss = sum(x[j] for x, j in zip(losses, choice, strict=True))
        every = np.stack(np.meshgrid(*[range(3)] * 4)).reshape(4, -1).T
        fitting = [c for c in every if sum(s[j] for s, j in zip(sizes, c, strict=True)) <= 9.0]
        best = min(sum(x[j] for x, j in zip(losses, c, strict=True)) for c in fitting)
        assert total <= 9.0
        assert loss <= 1.35 * best  # the relaxation, plus what is spent of the rest


def test_allocation_beyond_reach():
    with pytest.raises(ValueError, match="not below 3"):
        allocation.allocate([np.array([3.0])], [np.array([0.0])], 2.0)
