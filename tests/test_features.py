"""The frontend against librosa (and torchaudio where it imports), which compute it in their way."""

import os
from pathlib import Path

import numpy as np
import pytest

from asr.runtime.audio import read_audio
from asr.runtime.config import FeatureConfig
from asr.runtime.features import log_mel, mel_filters, n_frames, normalize, raw_log_mel

CORPORA = Path(os.environ.get("ASR_CORPORA", Path(__file__).parents[1] / ".." / "shared"))

CONFIGS = [
    FeatureConfig(),
    FeatureConfig(sample_rate=8000, n_mels=40, n_fft=256, win_length=200, hop_length=80),
    FeatureConfig(n_mels=64, n_fft=400, win_length=400, preemphasis=0.0),
    FeatureConfig(win_length=401),
]


def chirp(n: int, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """A rising tone with noise, so that every mel bin has energy."""
    time = np.arange(n) / rate
    tone = 0.3 * np.sin(2 * np.pi * (100 + 0.2 * rate * time) * time)
    return (tone + 0.01 * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


def librosa_log_mel(waveform: np.ndarray, config: FeatureConfig) -> np.ndarray:
    """NeMo's recipe in float64 from librosa's parts: (T, n_mels)."""
    import librosa
    import scipy.signal

    x = waveform.astype(np.float64)
    x = np.append(x[:1], x[1:] - config.preemphasis * x[:-1])
    spectrum = librosa.stft(
        x, n_fft=config.n_fft, hop_length=config.hop_length, win_length=config.win_length,
        window=scipy.signal.get_window("hann", config.win_length, fftbins=False),
        center=True, pad_mode="constant",
    )  # fmt: skip
    filters = librosa.filters.mel(
        sr=config.sample_rate, n_fft=config.n_fft, n_mels=config.n_mels, htk=False, norm="slaney"
    )
    return np.log(filters @ np.abs(spectrum) ** 2 + 2.0**-24).T


def librosa_normalised(waveform: np.ndarray, config: FeatureConfig) -> np.ndarray:
    x = librosa_log_mel(waveform, config)
    return (x - x.mean(axis=0)) / (x.std(axis=0, ddof=1) + 1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "8 kHz", "no emphasis", "odd window"])
@pytest.mark.parametrize("n", [16000, 12345, 1601, 640])
def test_log_mel_equals_librosa(config, n):
    waveform = chirp(n, config.sample_rate)
    expected = librosa_log_mel(waveform, config)
    found = raw_log_mel(waveform, config)
    assert found.dtype == np.float32
    assert found.shape == expected.shape == (n_frames(n, config), config.n_mels)
    np.testing.assert_allclose(found, expected, atol=2e-3)  # float32 near the log's floor
    assert np.abs(found - expected).mean() < 2e-5
    np.testing.assert_allclose(
        log_mel(waveform, config), librosa_normalised(waveform, config), atol=5e-3
    )


@pytest.mark.skipif(not (CORPORA / "an4" / "test").is_dir(), reason=f"no an4 in {CORPORA}")
def test_real_speech_equals_librosa():
    paths = sorted((CORPORA / "an4" / "test").rglob("*.opus"))[:3]
    assert paths
    for path in paths:
        waveform = read_audio(path)
        expected = librosa_normalised(waveform, FeatureConfig())
        np.testing.assert_allclose(log_mel(waveform), expected, atol=5e-3)


def test_log_mel_equals_torchaudio():
    try:
        import torch
        import torchaudio
    except (ImportError, OSError) as error:
        pytest.skip(f"torchaudio does not import: {type(error).__name__}")
    waveform = chirp(16000)
    emphasised = torchaudio.functional.preemphasis(torch.from_numpy(waveform).double(), 0.97)
    mel = torchaudio.transforms.MelSpectrogram(
        16000, n_fft=512, win_length=400, hop_length=160, n_mels=80, norm="slaney",
        mel_scale="slaney", pad_mode="constant", wkwargs={"periodic": False},
    ).double()  # fmt: skip
    expected = torch.log(mel(emphasised) + 2.0**-24).T.numpy()
    np.testing.assert_allclose(raw_log_mel(waveform), expected, atol=2e-3)


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "8 kHz", "no emphasis", "odd window"])
def test_mel_filters_equal_librosa(config):
    import librosa

    expected = librosa.filters.mel(
        sr=config.sample_rate, n_fft=config.n_fft, n_mels=config.n_mels, htk=False, norm="slaney"
    )
    np.testing.assert_allclose(mel_filters(config), expected, atol=1e-7)


@pytest.mark.parametrize("frequency", [300.0, 1000.0, 4000.0])
def test_a_tone_lights_its_own_bin(frequency):
    edges = librosa_edges()
    time = np.arange(16000) / 16000
    waveform = np.sin(2 * np.pi * frequency * time).astype(np.float32)
    loudest = raw_log_mel(waveform)[50].argmax()
    assert edges[loudest] < frequency < edges[loudest + 2]


def librosa_edges() -> np.ndarray:
    import librosa

    return librosa.mel_frequencies(82, fmin=0, fmax=8000)


@pytest.mark.parametrize("n", [0, 1, 159, 160, 161, 400, 512, 4800])
def test_one_frame_every_hop(n):
    features = log_mel(chirp(n))
    assert features.shape == (1 + n // 160, 80)
    assert np.isfinite(features).all()


def test_normalisation_over_the_utterance():
    x = np.random.default_rng(0).normal(3, 5, (50, 80)).astype(np.float32)
    y = normalize(x, FeatureConfig())
    np.testing.assert_allclose(y.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(axis=0, ddof=1), 1, atol=1e-4)
    assert (
        normalize(np.full((5, 80), 7.0, np.float32), FeatureConfig()).max() == 0
    )  # no division by zero
    assert normalize(np.zeros((0, 80), np.float32), FeatureConfig()).shape == (0, 80)


def test_loudness_changes_nothing():
    waveform = np.random.default_rng(0).normal(0, 0.2, 16000).astype(np.float32)
    difference = np.abs(log_mel(waveform) - log_mel(0.5 * waveform))
    assert difference.max() < 0.03  # the log's guard, in the lowest bin that pre-emphasis empties
    assert difference.mean() < 1e-4


def test_silence_is_finite():
    assert np.abs(log_mel(np.zeros(8000, np.float32))).max() < 1e-3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"win_length": 600}, "win_length"), ({"win_length": 0}, "win_length"),
        ({"n_mels": 0}, "n_mels"), ({"hop_length": 0}, "hop_length"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        FeatureConfig(**changes)
