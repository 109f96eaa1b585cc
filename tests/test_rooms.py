"""What rooms, recorders and telephones do, against closed forms and other libraries."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import signal

from asr.training import rooms
from asr.training.augment import AugmentConfig, degrade

PLAIN = AugmentConfig(shift=0, speed=0, warp=0, gain=0, time_masks=0, freq_masks=0)
KINDS = ("reverb", "babble", "noise", "clip", "telephone", "codec", "level")


def speech(n: int = 24000) -> np.ndarray:
    """A tone of 500 Hz that swells, between two silences."""
    t = np.arange(n) / 16000
    envelope = np.clip(np.sin(2 * np.pi * 1.5 * t), 0, None)
    return (0.3 * envelope * np.sin(2 * np.pi * 500 * t)).astype(np.float32)


def decibels(x: float) -> float:
    return 10 * np.log10(x)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_changes_the_waveform_and_keeps_its_length(kind):
    config = AugmentConfig(**{**vars(PLAIN), kind: 1.0})
    wave = speech()
    heard = degrade(wave, np.random.default_rng(0), config, lambda rng: [speech(9000)[::-1]])
    again = degrade(wave, np.random.default_rng(0), config, lambda rng: [speech(9000)[::-1]])
    assert heard.shape == wave.shape
    assert heard.dtype == np.float32
    assert np.isfinite(heard).all()
    assert not np.allclose(heard, wave, atol=1e-4)
    assert np.array_equal(heard, again)  # one seed, one sound


def test_nothing_is_changed_where_all_is_off():
    wave = speech()
    assert np.array_equal(degrade(wave, np.random.default_rng(0), PLAIN), wave)


def test_a_room_without_echo_only_delays():
    size, at = np.array([5.0, 4.0, 3.0]), np.array([1.0, 1.0, 1.0])
    response = rooms.room_response(size, at, at + 1.5, absorption=1.0)
    assert response[0] == 1
    assert not response[1:].any()


def test_first_echoes_come_when_geometry_says():
    size = np.array([6.0, 5.0, 3.0])
    source, microphone = np.array([2.0, 2.5, 1.2]), np.array([4.0, 2.5, 1.2])
    response = rooms.room_response(size, source, microphone, absorption=0.5)
    direct, floor = 2.0, np.hypot(2.0, 2.4)  # by the floor: twice 1.2 m down
    delay = round((floor - direct) / 343 * 16000)
    assert not response[1:delay].any()
    assert response[delay] == pytest.approx(0.5**0.5 * direct / floor, rel=1e-3)


@pytest.mark.parametrize("snr", [5.0, 20.0])
def test_noise_has_the_ratio_asked_for(snr):
    wave = speech()
    noise = rooms.coloured_noise(len(wave), np.random.default_rng(0))
    added = rooms.add_noise(wave, noise, snr) - wave
    ratio = decibels(rooms.speech_power(wave)) - decibels(float(np.mean(added**2)))
    assert ratio == pytest.approx(snr, abs=0.1)


def test_silence_around_does_not_change_the_level_of_speech():
    wave = np.tile(speech(10000), 3)
    around = np.concatenate([np.zeros(16000, "f4"), wave])
    for level in (-50.0, -20.0):
        loud = rooms.to_level(around, level)
        assert decibels(rooms.speech_power(loud)) == pytest.approx(level, abs=0.2)


def test_levels_are_rounded_to_16_bits():
    quiet = rooms.to_level(speech(), -50.0) * 32767
    np.testing.assert_allclose(quiet, np.round(quiet), atol=1e-3)


def test_a_telephone_passes_its_band_alone():
    rng = np.random.default_rng(0)
    wave = 0.1 * rng.standard_normal(64000).astype(np.float32)
    hertz, power = signal.welch(rooms.telephone(wave, rng), 16000, nperseg=1024)
    band = power[(hertz > 500) & (hertz < 3000)].mean()
    assert decibels(power[hertz > 4300].mean() / band) < -30


@pytest.mark.parametrize("law", [rooms.mu_law, rooms.a_law])
def test_companding_keeps_38_decibels_at_any_level(law):
    t = np.arange(16000) / 16000
    for level in (0.9, 0.1, 0.01):  # G.711: the ratio hardly depends on the level
        tone = (level * np.sin(2 * np.pi * 441 * t)).astype(np.float32)
        error = law(tone) - tone
        ratio = decibels(float(np.mean(tone**2))) - decibels(float(np.mean(error**2)))
        assert 24 < ratio < 45


def test_babble_is_made_of_the_voices():
    voices = [speech(8000), speech(5000)]
    crowd = rooms.babble(voices, 20000, np.random.default_rng(0))
    assert len(crowd) == 20000
    assert np.mean(crowd**2) == pytest.approx(2.0, rel=0.5)  # two of power 1


def test_clipping_takes_the_loudest_away():
    wave = speech()
    cut = rooms.clip(wave, np.random.default_rng(0))
    assert np.abs(cut).max() < np.abs(wave).max()
    quiet = np.abs(wave) < np.abs(cut).max()
    assert np.array_equal(cut[quiet], wave[quiet])
