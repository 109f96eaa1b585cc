"""Clustering: k-means against scikit-learn, exact zeros, codebooks that train."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import nn

from compress.clustering import method as clustering
from compress.clustering.kmeans import kmeans
from compress.clustering.method import ClusteredConv, ClusteredLinear, Config


def sample(kind, count=6000):
    rng = np.random.default_rng(0)
    values = {
        "normal": rng.normal(size=count),
        "heavy tails": rng.standard_t(3, size=count),
        "two humps": np.concatenate(
            [rng.normal(-3, 0.1, count // 2), rng.normal(2, 1, count // 2)]
        ),
    }[kind]
    return torch.from_numpy(values.astype(np.float32))


def inertia(values, codebook, indices, weight=None):
    error = (values - codebook[indices.long()]).double().square()
    return float((error if weight is None else error * weight).sum())


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "two humps"])
@pytest.mark.parametrize("k", [2, 16, 64])
@pytest.mark.parametrize("weighted", [False, True])
def test_as_good_as_scikit_learn(kind, k, weighted):
    values = sample(kind)
    random = torch.rand(len(values), generator=torch.Generator().manual_seed(0)) + 0.1
    weight = random if weighted else None
    codebook, indices = kmeans(values, k, weight)
    reference = KMeans(k, n_init=3, random_state=0)
    reference.fit(values[:, None].numpy(), sample_weight=None if weight is None else weight.numpy())
    tolerance = 1.1 if kind == "heavy tails" else 1.03  # both find local optima
    assert inertia(values, codebook, indices, weight) <= tolerance * reference.inertia_


def test_indices_are_the_nearest_entries_and_values_fit_fp16():
    values = sample("normal").view(60, 100)
    codebook, indices = kmeans(values, 16)
    assert indices.shape == values.shape
    assert torch.equal(codebook, codebook.half().float())
    assert torch.equal(codebook, codebook.sort().values)
    nearest = (values.unsqueeze(2) - codebook).abs().min(2).values
    assert torch.allclose((values - codebook[indices.long()]).abs(), nearest)


def test_zeros_stay_zero():
    values = sample("normal")
    values[::3] = 0
    codebook, indices = kmeans(values, 8)
    assert (codebook[indices.long()][::3] == 0).all()
    assert len(codebook) == 8


@pytest.mark.parametrize(
    "values",
    [torch.zeros(10), torch.full((10,), 0.5), torch.tensor([0.0, 0.5, -0.25] * 5), torch.ones(1)],
)
def test_few_different_values_are_kept(values):
    codebook, indices = kmeans(values, 4)
    assert len(codebook) == 4
    assert torch.equal(codebook[indices.long()], values)


def test_codebooks_of_parts_of_the_outputs():
    linear = nn.Linear(30, 10)
    linear.weight.data[5:] *= 100
    layer = ClusteredLinear.from_linear(linear, Config(num_clusters=8, codebooks=2))
    for part in (slice(0, 5), slice(5, 10)):
        error = (layer.weight() - linear.weight)[part].norm() / linear.weight[part].norm()
        assert error < 0.15
    one = ClusteredLinear.from_linear(linear, Config(num_clusters=8))
    assert (one.weight() - linear.weight)[:5].norm() > 0.5 * linear.weight[:5].norm()
    uneven = ClusteredLinear.from_linear(nn.Linear(30, 9), Config(num_clusters=4, codebooks=8))
    assert uneven(torch.randn(2, 30)).shape == (2, 9)


def test_importance_moves_precision_to_the_columns_that_matter():
    linear = nn.Linear(40, 200)
    importance = torch.ones(40)
    importance[:4] = 1000
    linear.weight.data[:, :4] *= 0.3
    plain, weighted = (
        ClusteredLinear.from_linear(linear, Config(num_clusters=8), gram)
        for gram in (None, importance.diag())
    )
    errors = [(m.weight() - linear.weight)[:, :4].norm().item() for m in (plain, weighted)]
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("codebooks", [1, 3])
def test_indices_make_up_for_each_other_where_inputs_correlate(codebooks):
    """The mean over several layers: what one gains hangs on its draw."""
    config = Config(num_clusters=8, codebooks=codebooks)
    shares = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2000, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
        linear = nn.Linear(48, 30)
        linear.weight.data = torch.randn(30, 48, generator=generator) / 48**0.5
        pruned = torch.rand(30, 48, generator=generator) < 0.2
        linear.weight.data[pruned] = 0
        gram = x.T @ x / len(x)
        diagonal, whole = (
            ClusteredLinear.from_linear(linear, config, g) for g in (gram.diagonal().diag(), gram)
        )
        plain, better = (
            (x @ (layer.weight() - linear.weight).T).square().mean().item()
            for layer in (diagonal, whole)
        )
        shares.append(better / plain)
        assert torch.equal(diagonal.codebook, whole.codebook)
        assert (whole.weight()[pruned] == 0).all()
    assert sum(shares) / len(shares) < 0.8


@pytest.mark.parametrize("clusters", [3, 16, 100, 256])
@pytest.mark.parametrize("codebooks", [1, 3])
def test_layers_build_empty_and_export_the_same(clusters, codebooks):
    config = Config(num_clusters=clusters, codebooks=codebooks)
    conv = nn.Conv2d(4, 9, 3, 2, 1)
    for layer, x in (
        (ClusteredLinear.from_linear(nn.Linear(20, 9), config), torch.randn(2, 5, 20)),
        (ClusteredConv.from_conv(conv, config), torch.randn(2, 4, 11, 8)),
    ):
        layer.eval()
        empty = type(layer)(**layer.args).eval()
        empty.load_state_dict(layer.state_dict(), strict=True, assign=True)
        assert torch.equal(empty(x), layer(x))
        assert torch.equal(layer.onnx_layer("float")(x), layer(x))
        difference = layer.onnx_layer("int8")(x) - layer(x)
        assert difference.abs().mean() < 0.02 * layer(x).abs().mean()


def test_codebooks_train_and_zero_stays():
    torch.manual_seed(0)
    linear, target = nn.Linear(16, 32), nn.Linear(16, 32)
    linear.weight.data[:, ::2] = 0
    model = nn.Sequential(ClusteredLinear.from_linear(linear, Config(num_clusters=16))).train()
    layer, indices = model[0], model[0].indices.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        x = torch.randn(64, 16)
        loss = (model(x) - target(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    clustering.freeze(model.eval(), Config())
    assert torch.equal(layer.indices, indices)
    assert (layer.weight()[:, ::2] == 0).all()
    assert torch.equal(layer.codebook, layer.codebook.half().float())


@pytest.mark.parametrize("options", [{"num_clusters": 1}, {"num_clusters": 257}, {"codebooks": 0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Config(**options)
