"""Greedy decoding against a ten-line reference, the CTC loss against a program in float64."""

import itertools
import math

import numpy as np
import pytest
import torch

from asr.network.model import Output
from asr.runtime.decoding import greedy_decode, greedy_decode_batch
from asr.runtime.features import subsampled_length
from asr.training.data import Batch
from asr.training.loss import ctc_loss


def reference_decode(log_probs: np.ndarray, blank: int = 0) -> list[int]:
    out, previous = [], None
    for frame in log_probs:
        best = max(range(len(frame)), key=lambda v: frame[v])
        if best != previous and best != blank:
            out.append(best)
        previous = best
    return out


def reference_loss(log_probs: np.ndarray, target: list[int], blank: int = 0) -> float:
    """-log of the probability of all paths: Graves et al. 2006, in float64; (T, V), target ids."""
    symbols = [blank]
    for token in target:
        symbols += [token, blank]
    alpha = {0: float(log_probs[0, blank])}
    if target:
        alpha[1] = float(log_probs[0, target[0]])
    for frame in log_probs[1:].astype(np.float64):
        new = {}
        for s, symbol in enumerate(symbols):
            before = [s, s - 1]
            if symbol != blank and s > 1 and symbols[s - 2] != symbol:
                before.append(s - 2)
            terms = [alpha[b] for b in before if b in alpha]
            if terms:
                new[s] = float(np.logaddexp.reduce(terms)) + float(frame[symbol])
        alpha = new
    ends = [alpha[s] for s in (len(symbols) - 1, len(symbols) - 2) if s in alpha]
    return -float(np.logaddexp.reduce(ends)) if ends else math.inf


def random_log_probs(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.standard_normal(shape) * 3
    return (x - np.logaddexp.reduce(x, axis=-1, keepdims=True)).astype(np.float32)


def make_batch(frames: list[int], targets: list[list[int]]) -> Batch:
    width = max(1, *map(len, targets))
    return Batch(
        features=torch.zeros(len(frames), max(frames), 80),
        feature_lengths=torch.tensor(frames),
        targets=torch.tensor([t + [0] * (width - len(t)) for t in targets]),
        target_lengths=torch.tensor([len(t) for t in targets]),
        indices=tuple(range(len(frames))),
        seconds=1.0,
    )


@pytest.mark.parametrize("vocab", [2, 3, 29])
def test_greedy_equals_the_reference(vocab):
    rng = np.random.default_rng(vocab)
    for n in range(30):
        log_probs = random_log_probs(rng, n, vocab)
        assert greedy_decode(log_probs) == reference_decode(log_probs)
        assert greedy_decode(log_probs, blank_id=1) == reference_decode(log_probs, blank=1)


def test_repeats_merge_unless_a_blank_parts_them():
    one_hot = np.eye(3)[[1, 1, 0, 1, 2, 2, 1]]
    assert greedy_decode(one_hot) == [1, 1, 2, 1]


def test_padding_frames_are_never_read():
    rng = np.random.default_rng(0)
    log_probs, lengths = random_log_probs(rng, 4, 20, 5), np.array([20, 7, 1, 0])
    found = greedy_decode_batch(log_probs, lengths)
    assert found == [reference_decode(x[:n]) for x, n in zip(log_probs, lengths, strict=True)]
    assert found[3] == []


def test_reference_loss_sums_over_all_paths():
    """The reference itself, against enumeration."""
    log_probs = random_log_probs(np.random.default_rng(1), 4, 3)
    for target in ([], [1], [1, 2], [2, 2], [1, 2, 1]):
        total = sum(
            math.exp(sum(float(log_probs[t, v]) for t, v in enumerate(path)))
            for path in itertools.product(range(3), repeat=4)
            if reference_decode(np.eye(3)[list(path)]) == target
        )
        assert -math.log(total) == pytest.approx(reference_loss(log_probs, target), abs=1e-6)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_ctc_loss_equals_the_dynamic_program(factor):
    rng = np.random.default_rng(factor)
    frames = [factor * 12, factor * 12 - 1, factor * 7 + 1, factor * 3]
    targets = [[1, 2, 2, 3], [4, 1, 4], [], [2]]
    log_probs = random_log_probs(rng, 4, 12, 6)
    batch = make_batch(frames, targets)
    output = Output(torch.from_numpy(log_probs), torch.zeros(4), [])
    lengths = [math.ceil(n / factor) for n in frames]
    assert subsampled_length(batch.feature_lengths, factor).tolist() == lengths
    expected = sum(
        reference_loss(x[:n], t) for x, n, t in zip(log_probs, lengths, targets, strict=True)
    )
    assert float(ctc_loss(output, batch, factor, 0.3)) == pytest.approx(expected, rel=1e-5)


def test_intermediate_outputs_share_the_loss():
    rng = np.random.default_rng(0)
    last, first, second = (random_log_probs(rng, 2, 10, 5) for _ in range(3))
    targets = [[1, 2], [3]]
    batch = make_batch([40, 33], targets)
    last_one, *others = map(torch.from_numpy, (last, first, second))
    output = Output(last_one, torch.tensor([10, 9]), others)

    def one(x: np.ndarray) -> float:
        return reference_loss(x[0], targets[0]) + reference_loss(x[1, :9], targets[1])

    expected = 0.7 * one(last) + 0.3 * (one(first) + one(second)) / 2
    assert float(ctc_loss(output, batch, 4, 0.3)) == pytest.approx(expected, rel=1e-5)


def test_an_impossible_target_counts_as_zero_and_has_no_gradient():
    rng = np.random.default_rng(0)
    log_probs = torch.from_numpy(random_log_probs(rng, 2, 3, 5)).requires_grad_()
    targets = [[1, 1, 1], [2]]  # the first needs five frames
    assert reference_loss(log_probs[0].detach().numpy(), targets[0]) == math.inf
    loss = ctc_loss(Output(log_probs, torch.zeros(2), []), make_batch([12, 12], targets), 4, 0.3)
    expected = reference_loss(log_probs[1].detach().numpy(), [2])
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert log_probs.grad is not None
    assert log_probs.grad[0].abs().max() == 0
    assert torch.isfinite(log_probs.grad).all()
