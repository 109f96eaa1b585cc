"""Reading audio: against what soundfile wrote and numpy computes, and every kind of bad file."""

import io
import os
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr.runtime.audio import (
    audio_duration,
    check_waveform,
    limit_peak,
    read_audio,
)
from asr.runtime.sources import AudioError

CORPORA = Path(os.environ.get("ASR_CORPORA", Path(__file__).parents[1] / ".." / "shared"))
RATE = 16000


def tone(seconds=0.5, rate=RATE, hertz=440.0, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


# what a sample may be off by: half a step of the integers, or what the codec loses
PCM = [
    ("WAV", "PCM_U8", 2**-7),
    ("WAV", "PCM_16", 2**-15),
    ("WAV", "PCM_24", 2**-23),
    ("WAV", "PCM_32", 1e-7),
    ("WAV", "FLOAT", 1e-7),
    ("WAV", "DOUBLE", 1e-7),
    ("WAVEX", "PCM_16", 2**-15),
    ("FLAC", "PCM_S8", 2**-7),
    ("FLAC", "PCM_16", 2**-15),
    ("FLAC", "PCM_24", 2**-23),
    ("AIFF", "PCM_16", 2**-15),
]
LOSSY = [("OGG", "VORBIS", 0.1), ("OGG", "OPUS", 0.1), ("MP3", "MPEG_LAYER_III", 0.1)]


@pytest.mark.parametrize(("container", "subtype", "tolerance"), PCM + LOSSY)
def test_formats(tmp_path, container, subtype, tolerance):
    path = tmp_path / "clip"  # the content tells the format, not the name
    expected = tone()
    soundfile.write(path, expected, RATE, format=container, subtype=subtype)
    waveform = read_audio(path)
    assert waveform.dtype == np.float32
    assert waveform.shape == expected.shape
    assert waveform.flags.c_contiguous
    inner = slice(200, -200) if subtype == "OPUS" else slice(None)  # it fades at the edges
    np.testing.assert_allclose(waveform[inner], expected[inner], atol=tolerance)
    assert audio_duration(path) == pytest.approx(0.5)


def test_sixteen_bit_is_exact(tmp_path):
    values = np.array([0, 1, -1, 32767, -32768, 1234] * 100, np.int16)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:  # the standard library as reference
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(values.tobytes())
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav") * 32768, values)
    np.testing.assert_array_equal(check_waveform(values) * 32768, values)


@pytest.mark.parametrize("channels", [2, 6])
def test_down_mix(tmp_path, channels):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (4000, channels))
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), samples.mean(1), atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_resampling(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", tone(1.0, rate), rate, subtype="FLOAT")
    waveform = read_audio(tmp_path / "a.wav")
    assert len(waveform) == pytest.approx(RATE, abs=1)
    middle = slice(1000, 15000)  # the filter has no samples to work on at the edges
    np.testing.assert_allclose(waveform[middle], tone(1.0)[middle], atol=2e-3)
    assert audio_duration(tmp_path / "a.wav") == pytest.approx(1.0, abs=1e-3)


def test_another_rate(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1.0), RATE)
    assert len(read_audio(tmp_path / "a.wav", 8000)) == 8000


@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (24000, 2)])
def test_long_files_are_read_in_pieces(tmp_path, monkeypatch, rate, channels):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (50_000, channels))
    soundfile.write(tmp_path / "a.flac", samples, rate)
    whole = read_audio(tmp_path / "a.flac")
    monkeypatch.setattr("asr.runtime.audio.BLOCK", 7000)
    np.testing.assert_allclose(read_audio(tmp_path / "a.flac"), whole, atol=1e-6)


def test_peak_is_scaled_back(tmp_path):
    loud = tone(amplitude=4.0)
    soundfile.write(tmp_path / "a.wav", loud, RATE, subtype="FLOAT")
    waveform = read_audio(tmp_path / "a.wav")
    np.testing.assert_allclose(waveform, loud / np.abs(loud).max(), atol=1e-6)
    assert np.abs(waveform).max() <= 1
    quiet = np.array([0.5, -1.0], np.float32)
    assert limit_peak(quiet) is quiet


def test_silence_is_fine(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(1600), RATE)
    assert not read_audio(tmp_path / "a.wav").any()


def wav_bytes(samples=None, subtype="PCM_16", container="WAV"):
    buffer = io.BytesIO()
    soundfile.write(
        buffer, tone() if samples is None else samples, RATE, format=container, subtype=subtype
    )
    return buffer.getvalue()


def cut(container, subtype, share):
    data = wav_bytes(tone(3.0), subtype, container)
    return data[: int(share * len(data))]


BAD = {
    "empty.wav": (b"", "empty"),
    "text.wav": (b"hello, this is no audio\n" * 40, "not audio"),
    "text.mp3": (b"hello, this is no audio\n" * 40, "not audio"),
    "zeros.mp3": (bytes(4000), "not audio"),
    "noise.mp3": (b"ID3\x04\0\0\0\0\0\0" + np.random.default_rng(0).bytes(4000), "not audio"),
    "noise.flac": (np.random.default_rng(0).bytes(4000), "not audio"),
    "data.raw": (bytes(4000), "not audio"),
    "header.wav": (wav_bytes()[:44], "truncated"),
    "half.wav": (cut("WAV", "PCM_16", 0.5), "truncated"),
    "float.wav": (cut("WAV", "FLOAT", 0.9), "truncated"),
    "tiny.wav": (wav_bytes()[:30], "truncated"),
    "half.flac": (cut("FLAC", "PCM_16", 0.5), "damaged"),
    "half.opus": (cut("OGG", "OPUS", 0.5), "truncated"),
    "most.ogg": (cut("OGG", "VORBIS", 0.99), "truncated"),
    "half.mp3": (cut("MP3", "MPEG_LAYER_III", 0.5), "truncated"),
    "zero.wav": (wav_bytes(np.zeros(0)), "no samples"),
    "zero.flac": (wav_bytes(np.zeros(0), container="FLAC"), "zero.flac"),
    "nan.wav": (wav_bytes(np.array([0, 0.1, np.nan, 0.2]), "FLOAT"), "first at sample 2"),
    "inf.wav": (wav_bytes(np.array([0, -np.inf, np.nan]), "FLOAT"), "2 samples are NaN"),
    "huge.wav": (wav_bytes(np.array([0, 1e300]), "DOUBLE"), "infinite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name, capfd):
    content, message = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(AudioError, match=message) as info:
        read_audio(path)
    text = str(info.value)
    assert str(path) in text
    assert "\n" not in text
    assert capfd.readouterr() == ("", "")  # nothing of the decoders' own


def test_page_boundary_cut_is_noticed(tmp_path):
    data = wav_bytes(tone(3.0), "OPUS", "OGG")
    (tmp_path / "a.opus").write_bytes(data[: data.rfind(b"OggS")])
    with pytest.raises(AudioError, match="truncated"):
        read_audio(tmp_path / "a.opus")


def test_flac_without_length(tmp_path):
    data = bytearray(wav_bytes(container="FLAC"))
    data[21] &= 0xF0  # the sample count in STREAMINFO, as an encoder writing to a pipe leaves it
    data[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(data)
    for function in (read_audio, audio_duration):
        with pytest.raises(AudioError, match="no length"):
            function(tmp_path / "a.flac")


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF])
def test_wav_written_to_a_pipe(tmp_path, size):
    data = bytearray(wav_bytes())
    at = data.find(b"data") + 4
    data[at : at + 4] = struct.pack("<I", size)
    (tmp_path / "a.wav").write_bytes(data)
    assert len(read_audio(tmp_path / "a.wav")) == RATE // 2


def mp3_bytes(mode):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 3 * RATE) * np.linspace(0, 1, 3 * RATE)
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, RATE, format="MP3", bitrate_mode=mode, compression_level=0.5)
    return buffer.getvalue()


def test_mp3_with_tags(tmp_path):
    tag = b"ID3\x03\0\0\0\0\x0f\x50" + bytes(15 * 128 + 80)
    (tmp_path / "a.mp3").write_bytes(tag + mp3_bytes("VARIABLE") + b"TAG" + bytes(125))
    assert len(read_audio(tmp_path / "a.mp3")) == 3 * RATE


def test_mp3_without_xing_header(tmp_path):
    path = tmp_path / "a.mp3"
    data = mp3_bytes("CONSTANT")
    frame = data.find(data[:3], 1)
    assert b"Info" in data[:frame]
    path.write_bytes(data[frame:])
    assert len(read_audio(path)) == pytest.approx(3 * RATE, abs=2000)
    path.write_bytes(data[frame : len(data) // 2])
    with pytest.raises(AudioError, match="truncated"):
        read_audio(path)
    data = mp3_bytes("VARIABLE")
    path.write_bytes(data[data.find(data[:2], 1) :])
    with pytest.raises(AudioError, match="variable bit rate"):
        read_audio(path)


def test_missing_folder_and_pipe(tmp_path):
    with pytest.raises(AudioError, match="no such audio file"):
        read_audio(tmp_path / "none.wav")
    with pytest.raises(AudioError, match="folder"):
        audio_duration(tmp_path)
    with pytest.raises(AudioError, match="cannot be read"):
        read_audio("a\0b.wav")
    if Path("/dev/null").exists():
        with pytest.raises(AudioError, match="not a regular file"):
            read_audio("/dev/null")


def test_odd_sample_rate(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(), 100)
    with pytest.raises(AudioError, match="100 Hz"):
        read_audio(tmp_path / "a.wav")
    with pytest.raises(AudioError, match="0 Hz"):
        check_waveform(tone(), 0)


@pytest.mark.parametrize(
    "samples",
    [
        tone(),
        tone().astype(np.float16),
        list(tone()),
        (tone() * 127).astype(np.int8),
        (tone() * 127 + 128).astype(np.uint8),
        (tone() * 32767).astype(np.int16),
        (tone() * 32767).astype(np.int64),
        (tone() * 2147483647).astype(np.int32),
        np.stack([tone(), tone()]),
        np.stack([tone(), tone()], axis=1),
        tone()[:, None],
    ],
    ids=lambda x: f"{np.asarray(x).dtype}{np.shape(x)}",
)
def test_arrays(samples):
    waveform = check_waveform(samples)
    assert waveform.dtype == np.float32
    np.testing.assert_allclose(waveform, tone(), atol=2e-2)


def test_array_is_resampled():
    waveform = check_waveform(tone(1.0, 44100), 44100)
    np.testing.assert_allclose(waveform[1000:15000], tone(1.0)[1000:15000], atol=2e-3)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(0), "no samples"),
        (np.zeros((2, 2, 2)), "one axis"),
        (np.zeros((20, 16000)), "more than 8 channels"),
        (np.array([0.0, np.nan]), "NaN"),
        (np.array([0.0, 1e300]), "infinite"),
        (np.array([True, False]), "expected floats"),
        (np.array(["a"]), "expected floats"),
    ],
)
def test_bad_arrays(samples, message):
    with pytest.raises(AudioError, match=message):
        check_waveform(samples)


@pytest.mark.skipif(not (CORPORA / "LibriSpeech").is_dir(), reason="no real speech: ASR_CORPORA")
def test_real_speech():
    paths = sorted((CORPORA / "LibriSpeech" / "dev-clean").rglob("*.opus"))[:5]
    assert paths
    for path in paths:
        expected, rate = soundfile.read(path, dtype="float32")
        waveform = read_audio(path)
        assert rate == RATE
        assert len(waveform) / RATE == audio_duration(path)
        assert 0.01 < np.abs(waveform).max() <= 1
        np.testing.assert_allclose(waveform, limit_peak(expected), atol=1e-6)
