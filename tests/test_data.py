"""Batches: within the caps, every utterance once, the same whatever the workers; augmentation."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from asr.corpus.manifest import Utterance
from asr.corpus.splits import load_splits
from asr.runtime.config import FeatureConfig
from asr.runtime.tokenizer import Tokenizer
from asr.training.augment import (
    AugmentConfig,
    Timing,
    retime,
    spec_augment,
    timing,
    warp_frequency,
)
from asr.training.data import (
    BatchDataset,
    draw_corpora,
    drop_impossible,
    epoch_batches,
    make_loader,
    padded_frames,
    utterance_rng,
)
from tests.corpus import tone_waveform, write_corpus

PLAIN = AugmentConfig(shift=0, speed=0, warp=0, noise=0, gain=0, time_masks=0, freq_masks=0)


@pytest.fixture(scope="module")
def durations():
    return np.random.default_rng(0).gamma(4.0, 2.0, 300).tolist()


def test_batches_hold_every_utterance_once_within_the_caps(durations):
    batches = epoch_batches(durations, 3, batch_size=8, batch_seconds=60, augment=AugmentConfig())
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    for batch in batches:
        assert len(batch) <= 8
        slowest = max(durations[i] for i in batch) / 0.9
        assert len(batch) == 1 or slowest * len(batch) <= 60 / 0.9 * 1.1


def test_batches_differ_by_epoch_and_repeat_by_seed(durations):
    def make(epoch, seed=0):
        return epoch_batches(durations, epoch, 8, 60, seed)

    assert make(1) == make(1)
    assert make(1) != make(2)
    assert make(1) != make(1, seed=1)


def test_batches_come_in_few_shapes(durations):
    lengths = {padded_frames(n) for n in range(1, 3500)}
    assert len(lengths) < 50
    assert all(n <= padded_frames(n) <= max(64, 1.1 * n + 16) for n in range(1, 3500))


def test_sorted_epoch_goes_from_short_to_long(durations):
    batches = epoch_batches(durations, 0, 8, 60, sort=True)
    longest = [max(durations[i] for i in batch) for batch in batches]
    assert longest == sorted(longest)


def test_bucketing_wastes_little(durations):
    padded = real = 0.0
    for batch in epoch_batches(durations, 1, 8, 60):
        lengths = [durations[i] for i in batch]
        padded, real = padded + max(lengths) * len(lengths), real + sum(lengths)
    assert padded / real < 1.2


def test_loader_gives_the_same_batches_with_and_without_workers(tmp_path):
    splits = load_splits(write_corpus(tmp_path))
    dataset = BatchDataset(
        splits.train, Tokenizer.characters("abc"), FeatureConfig(), AugmentConfig(noise=0.5)
    )
    keys = [(2, True, (0, 3, 5)), (2, True, (1, 2)), (3, False, (0,))]
    before = torch.get_rng_state()
    alone, helped = (list(make_loader(dataset, keys, workers)) for workers in (0, 2))
    assert torch.equal(torch.get_rng_state(), before)  # dropout must not depend on the loader
    for a, b, key in zip(alone, helped, keys, strict=True):
        assert torch.equal(a.features, b.features)
        assert torch.equal(a.targets, b.targets)
        assert a.indices == b.indices == key[2]
        assert a.features.shape == (len(key[2]), padded_frames(int(a.feature_lengths.max())), 80)
        assert a.targets.shape == (len(key[2]), int(a.target_lengths.max()))


def test_impossible_targets_are_parted():
    features, tokenizer = FeatureConfig(), Tokenizer.characters("ab")

    # 0.36 s are 37 frames, 10 after subsampling by 4
    def make(text):
        return Utterance("x.wav", 0.36, text)

    texts = ["ab" * 5, "ab" * 5 + "a", "aaaaa", "aaaaab", ""]
    possible, impossible = drop_impossible(
        [make(t) for t in texts], tokenizer, features, subsampling_factor=4
    )
    assert [u.text for u in possible] == [texts[0], texts[2], texts[3]]
    assert [u.text for u in impossible] == [texts[1], ""]


def test_speed_changes_length_and_pitch():
    wave = tone_waveform("aaaa")
    faster = retime(wave, Timing(1.1), utterance_rng(0, 0, 0), shift=0)
    assert len(faster) == pytest.approx(len(wave) / 1.1, abs=2)
    peaks = [np.argmax(np.abs(np.fft.rfft(x))) / len(x) * 16000 for x in (wave, faster)]
    assert peaks[1] / peaks[0] == pytest.approx(1.1, rel=0.01)
    factors = {timing(utterance_rng(0, 0, i), AugmentConfig(speed=0.1)).speed for i in range(50)}
    assert factors == {0.9, 1.0, 1.1}


def test_shift_cuts_less_than_a_hop_from_the_start():
    wave = tone_waveform("aaaa")
    shifted = [retime(wave, Timing(), utterance_rng(0, 0, i), shift=160) for i in range(50)]
    cuts = [len(wave) - len(one) for one in shifted]
    assert min(cuts) < 20
    assert 140 < max(cuts) < 160
    assert all(np.array_equal(one, wave[n:]) for one, n in zip(shifted, cuts, strict=True))


def test_silence_lengthens_as_the_timing_says():
    config = AugmentConfig(speed=0.1, silence=1.0)
    time = timing(utterance_rng(0, 0, 3), config)
    wave = tone_waveform("aaaa")
    longer = retime(wave, time, utterance_rng(0, 0, 3), shift=0)
    assert time.before + time.after > 0
    assert len(longer) / 16000 == pytest.approx(time.duration(len(wave) / 16000), abs=0.001)
    quiet, loud = longer[: int(time.before * 16000)], longer[int(time.before * 16000) :]
    assert np.mean(quiet**2) < 0.002 * np.mean(loud**2)


def test_corpora_are_drawn_by_weight():
    corpora = ["a"] * 10 + ["b"] * 4 + ["c"] * 6
    weights = {"a": 0.5, "b": 2.0}
    first, second = (draw_corpora(corpora, weights, epoch) for epoch in (0, 1))
    counts = Counter(corpora[i] for i in first)
    assert counts == {"a": 5, "b": 8, "c": 6}
    halves = [i for i in (*first, *second) if i < 10]
    assert sorted(halves) == list(range(10))  # half an epoch each: all of it in two
    assert Counter(i for i in first if 10 <= i < 14) == dict.fromkeys(range(10, 14), 2)


def test_a_front_is_run_once_an_utterance(tmp_path):
    manifest = write_corpus(tmp_path / "data", 4)
    splits = load_splits(manifest)
    calls = []

    def front(features):
        calls.append(features.shape[1])
        return features[:, ::2, :5]

    dataset = BatchDataset(splits.train, Tokenizer.characters("abc"), FeatureConfig())
    plain = dataset[0, False, (0, 1)]
    dataset.begin_behind(front, tmp_path / "front")
    batch, again = (dataset[0, False, (0, 1)] for _ in range(2))
    assert calls == plain.feature_lengths.tolist()
    assert torch.equal(batch.features, again.features)
    n = int(batch.feature_lengths[0]) // 2
    assert n == (calls[0] + 1) // 2
    torch.testing.assert_close(
        batch.features[0, :n], plain.features[0, : calls[0] : 2, :5], atol=2e-3, rtol=1e-3
    )


def test_warp_moves_a_band_by_its_share():
    features = np.zeros((5, 80), np.float32)
    features[:, 40] = 1.0
    config = AugmentConfig(warp=0.1)
    for seed in range(5):
        warped = warp_frequency(features, np.random.default_rng(seed), config)
        hundredths = round(100 * np.random.default_rng(seed).uniform(-0.1, 0.1))
        centre = (warped[0] * np.arange(80)).sum() / warped[0].sum()
        assert centre == pytest.approx(40 / (1 + hundredths / 100), abs=0.6)
    assert warp_frequency(features, np.random.default_rng(0), PLAIN) is features


def test_masks_cover_at_most_their_share():
    config = AugmentConfig()
    for seed in range(20):
        masked = spec_augment(np.ones((200, 80), np.float32), np.random.default_rng(seed), config)
        frames, bins = (masked == 0).all(axis=1).sum(), (masked == 0).all(axis=0).sum()
        assert frames <= 5 * 10
        assert bins <= 2 * 27
