"""What removing units costs, and how their reader makes up for them: against NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from compress.calibration import Moments
from compress.pruning import removal


def inputs_and_moments(units, width=1):
    """Correlated inputs (frames, units * width) with a mean, as NumPy and as moments."""
    rng = np.random.default_rng(0)
    n = units * width
    x = rng.standard_normal((400, n)) @ rng.standard_normal((n, n)) + 1.0
    x = x.astype(np.float32)
    seen = torch.from_numpy(x)
    return x, Moments(seen.mean(0), seen.t() @ seen / len(x))


def least_squares(x, y):
    """NumPy's fit of y by x and a constant: what is left, squared and summed."""
    with_one = np.concatenate([x, np.ones((len(x), 1))], axis=1).astype(np.float64)
    solution = np.linalg.lstsq(with_one, y, rcond=None)[0]
    return solution, ((with_one @ solution - y) ** 2).sum()


@torch.no_grad()
def test_refitting_is_numpys_least_squares():
    torch.manual_seed(0)
    x, moments = inputs_and_moments(12)
    linear = nn.Linear(12, 5)
    y = linear(torch.from_numpy(x)).numpy().astype(np.float64)
    keep = torch.tensor([0, 3, 4, 7, 8, 11])
    removal.refit(linear, keep, moments)
    solution, _ = least_squares(x[:, keep], y)
    np.testing.assert_allclose(
        linear.weight[:, keep].numpy(), solution[:-1].T, rtol=0.05, atol=0.02
    )
    np.testing.assert_allclose(linear.bias.numpy(), solution[-1], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("width", [1, 3])
def test_costs_of_removal_are_numpys_least_squares(width, monkeypatch):
    monkeypatch.setattr(removal, "DAMPING", 1e-8)
    torch.manual_seed(0)
    x, moments = inputs_and_moments(6, width)
    weight = torch.randn(5, 6 * width)
    half = torch.randn(5, 5)
    gradients = half @ half.t()
    y = x.astype(np.float64) @ weight.numpy().T @ np.linalg.cholesky(gradients.double().numpy())
    costs = removal.costs(weight, moments, gradients, width, 1)
    left, spent = list(range(6)), 0.0
    for unit in costs.argsort().tolist()[:-1]:
        errors = {}
        for candidate in left:
            keep = [i for i in range(6 * width) if i // width in left and i // width != candidate]
            errors[candidate] = least_squares(x[:, keep], y)[1] / len(x)
        assert unit == min(errors, key=errors.get)
        assert float(costs[unit]) == pytest.approx(errors[unit] - spent, rel=0.01)
        spent = errors[unit]
        left.remove(unit)
    assert torch.isinf(costs[left[0]])


def test_units_go_a_multiple_at_a_time_and_the_rest_first():
    _, moments = inputs_and_moments(20)
    costs = removal.costs(torch.randn(5, 20), moments, torch.eye(5), 1, 8)
    assert costs.unique(return_counts=True)[1].tolist() == [4, 8, 8]
