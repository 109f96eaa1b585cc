"""Levels, offsets, hum and strays: what is quiet is raised, what is ordinary comes as it is."""

import numpy as np
import pytest

from asr.runtime.level import QUIET, settle_level, without_strays

RATE = 16000
TIME = np.arange(4 * RATE) / RATE


def speechlike(level=0.5, seed=0):
    """Tones that change ten times a second and swell, peak at `level`."""
    pitch = np.repeat(np.random.default_rng(seed).uniform(120, 3000, 40), RATE // 10)
    waveform = np.sin(2 * np.pi * np.cumsum(pitch) / RATE) * (0.6 - 0.4 * np.cos(30 * TIME))
    return (level * waveform / np.abs(waveform).max()).astype(np.float32)


def test_an_ordinary_waveform_is_not_touched():
    waveform = speechlike()
    assert settle_level(waveform, RATE) is waveform
    silence = np.zeros(RATE, np.float32)
    assert settle_level(silence, RATE) is silence


@pytest.mark.parametrize("level", [1e-4, 0.01, 3.0, 30000.0])
def test_levels_are_settled(level):
    wanted = speechlike(QUIET if level < 1 else 1.0)
    np.testing.assert_allclose(settle_level(speechlike(level), RATE), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stray", [1e6, -1e6, 5.0])
def test_a_stray_sample_goes(stray):
    waveform = speechlike()
    waveform[1234] = stray
    expected = speechlike()
    expected[1234] = 0
    np.testing.assert_array_equal(without_strays(waveform), expected)
    np.testing.assert_array_equal(settle_level(waveform, RATE), expected)


@pytest.mark.parametrize("offset", [0.3, -0.3])
def test_an_offset_goes(offset):
    settled = settle_level(speechlike() + np.float32(offset), RATE)
    assert abs(settled.mean()) < 0.005
    assert np.corrcoef(settled, speechlike())[0, 1] > 0.99


@pytest.mark.parametrize("hertz", [50, 60])
def test_a_hum_goes(hertz):
    hum = 0.2 * np.sin(2 * np.pi * hertz * TIME) + 0.1 * np.sin(4 * np.pi * hertz * TIME + 1)
    settled = settle_level(speechlike() + hum.astype(np.float32), RATE)
    assert np.abs(settled - speechlike()).std() < 0.03 < hum.std()
