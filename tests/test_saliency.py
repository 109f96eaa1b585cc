"""Unstructured pruning by what speech misses: which weights go, and what the others take over."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from asr.network.model import ConformerCTC
from asr.runtime.config import ModelConfig
from asr.training.data import Batch
from compress.calibration import input_moments, output_gradients, utterances
from compress.core import Calibration, linears
from compress.imitation import divergence
from compress.pruning import method as pruning
from compress.pruning import saliency
from compress.pruning.method import Config


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=32, n_layers=2, n_heads=2, conv_kernel_size=7, subsampling_channels=16
    )
    model = ConformerCTC(config).eval()
    with torch.no_grad():
        model.head.weight.mul_(5)  # an answer less flat than that of random weights
    return model


@pytest.fixture(scope="module")
def speech():
    """Features whose channels go together, as those of speech do."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(80, 80, generator=generator) * torch.logspace(0, -1, 80)
    features = torch.randn(4, 120, 80, generator=generator) @ mix.t()
    lengths = torch.tensor([120, 110, 100, 90])
    targets = torch.randint(1, 29, (4, 5), generator=generator)
    return Calibration([Batch(features, lengths, targets, torch.full((4,), 5), (0, 1, 2, 3), 1.0)])


@torch.no_grad()
def distance(model, other, speech):
    """Mean divergence of the answers, a frame."""
    total, frames = 0.0, 0
    for features, length in utterances(speech):
        x = features[:length].unsqueeze(0)
        example = model(x).log_probs
        lengths = torch.tensor([example.shape[1]])
        total += float(divergence(other(x).log_probs, example, lengths))
        frames += example.shape[1]
    return total / frames


def test_fitted_weights_are_numpys_least_squares(monkeypatch):
    monkeypatch.setattr(saliency, "ITERATIONS", 60)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight, mask = torch.randn(5, 12, generator=generator), torch.ones(5, 12, dtype=torch.bool)
    mask[torch.rand(5, 12, generator=generator) < 0.5] = False
    mask[4] = False  # a row of which nothing is left
    found = saliency.refit(weight, weight * mask, x.t() @ x / 200, mask)
    assert not found[~mask].any()
    for row in range(4):
        kept = mask[row].numpy()
        y = x.numpy() @ weight[row].numpy()
        expected, *_ = np.linalg.lstsq(x.numpy()[:, kept], y, rcond=None)
        np.testing.assert_allclose(found[row].numpy()[kept], expected, rtol=1e-3, atol=1e-3)


def test_what_costs_least_goes(model, speech, monkeypatch):
    monkeypatch.setattr(saliency, "ROUNDS", 1)
    chosen = linears(model, "*.ff1.*")
    names = [name for name, _ in chosen]
    moments = input_moments(model, speech, names)
    gradients = output_gradients(model, speech, names)
    costs = {}
    for name, layer in chosen:
        variance = moments[name].covariance.diagonal()
        variance = variance + saliency.DAMPING * variance.mean()
        costs[name] = layer.weight.detach() ** 2 * variance * gradients[name].diagonal()[:, None]
    ordered = torch.cat([cost.flatten() for cost in costs.values()]).sort().values
    most = ordered[round(0.4 * len(ordered))]
    saliency.prune(model, chosen, 0.4, "global", speech)
    for name, layer in chosen:
        clear = (costs[name] / most - 1).abs() > 1e-3
        assert torch.equal((layer.weight == 0)[clear], (costs[name] < most)[clear])


@pytest.mark.parametrize("allocation", ["global", "layer"])
def test_answers_stay_nearer_than_by_magnitude(model, speech, allocation):
    shares, distances = [], []
    for importance in ("norm", "taylor"):
        config = Config(sparsity=0.5, importance=importance, allocation=allocation)
        pruned = pruning.apply(copy.deepcopy(model), config, speech)
        weights = pruning.prunable(pruned, config)
        shares.append(sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights))
        distances.append(distance(model, pruned, speech))
    assert shares == pytest.approx([0.5, 0.5], abs=0.005)
    assert distances[1] < 0.5 * distances[0]


def test_convolutions_stay_and_linears_bear_their_share(model, speech):
    pruning.apply(model, Config(sparsity=0.5, importance="taylor", allocation="layer"), speech)
    zeros = {
        type(m).__name__: float((m.weight == 0).float().mean())
        for m in model.modules()
        if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)
    }
    assert zeros["Conv1d"] == zeros["Conv2d"] == 0
    assert zeros["Linear"] > 0.5
    assert "taylor" in pruning.why_kept(
        model, "blocks.0.conv.depthwise", Config(importance="taylor")
    )


def test_a_wide_layer_is_not_fitted(model, speech, monkeypatch):
    monkeypatch.setattr(saliency, "LARGEST", 16)
    before = model.blocks[0].ff1.up.weight.detach().clone()
    pruning.apply(model, Config(sparsity=0.3, importance="taylor"), speech)
    after = model.blocks[0].ff1.up.weight.detach()
    assert (after == 0).any()
    assert torch.equal(after[after != 0], before[after != 0])


def test_it_comes_before_fine_tuning_and_needs_speech(model, speech):
    config = Config(sparsity=0.3, importance="taylor")
    assert config.needs_calibration
    with pytest.raises(ValueError, match="--calibration_data"):
        pruning.apply(model, config)
    pruning.prepare(model, config, speech)
    weights = [w.clone() for w in pruning.prunable(model, config)]
    pruning.update(config, model, 0.9)
    assert all(map(torch.equal, weights, pruning.prunable(model, config)))
    assert sum(int((w == 0).sum()) for w in weights) > 0


def test_more_than_the_linears_hold(model, speech):
    with pytest.raises(ValueError, match="leaves convolutions whole"):
        pruning.apply(model, Config(sparsity=0.99, importance="taylor"), speech)
