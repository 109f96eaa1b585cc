"""Files are read to their end, or it is said what is missing: every container, cut and joined."""

import io
import struct

import numpy as np
import pytest
import soundfile

from asr.runtime.audio import audio_duration, read_audio, read_blocks
from asr.runtime.sources import AudioError

RATE = 16000
LOSSY = 0.05
ID3 = b"ID3\x03\0\0\0\0\x01\x50" + bytes(128 + 80)


def tone(hertz, seconds=2.0, rate=RATE):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def encoded(container, subtype, hertz=440.0, rate=RATE, **more):
    buffer = io.BytesIO()
    samples = tone(hertz, rate=rate)
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype, **more)
    return buffer.getvalue()


def pitch(waveform):
    """The strongest frequency of a waveform in Hz."""
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return spectrum.argmax() * RATE / len(waveform)


KINDS = [
    ("MP3", "MPEG_LAYER_III"), ("OGG", "OPUS"), ("OGG", "VORBIS"), ("FLAC", "PCM_16"),
    ("WAV", "PCM_16"),
]  # fmt: skip


@pytest.mark.parametrize("between", [b"", ID3], ids=["joined", "tagged"])
@pytest.mark.parametrize(
    ("container", "subtype"), [*KINDS, ("RF64", "PCM_16"), ("AIFF", "PCM_16"), ("CAF", "PCM_16"),
                               ("AIFF", "IMA_ADPCM")],
)  # fmt: skip
def test_joined_files_are_read_to_their_end(tmp_path, container, subtype, between):
    if between and container in ("OGG", "WAV", "RF64", "AIFF", "CAF"):
        pytest.skip("tags stand before these formats, not within")
    path = tmp_path / "joined"
    one, other = encoded(container, subtype, 440), encoded(container, subtype, 1000)
    path.write_bytes(one + between + other)
    waveform = read_audio(path)
    assert len(waveform) == pytest.approx(4 * RATE, abs=4000)  # an MP3 may count its padding
    assert audio_duration(path) == pytest.approx(len(waveform) / RATE, abs=0.01)
    assert pitch(waveform[: RATE * 3 // 2]) == pytest.approx(440, abs=2)
    assert pitch(waveform[-RATE * 3 // 2 :]) == pytest.approx(1000, abs=2)


def test_parts_may_have_different_rates(tmp_path):
    path = tmp_path / "a.ogg"
    path.write_bytes(encoded("OGG", "VORBIS") + encoded("OGG", "VORBIS", 1000, rate=44100))
    waveform = read_audio(path)
    assert len(waveform) == pytest.approx(4 * RATE, abs=100)
    assert pitch(waveform[-RATE:]) == pytest.approx(1000, abs=2)


@pytest.mark.parametrize(("container", "subtype"), [*KINDS, ("AIFF", "PCM_16"), ("AU", "PCM_16")])
def test_tags_may_stand_before_any_format(tmp_path, container, subtype):
    path = tmp_path / "tagged"
    path.write_bytes(ID3 + ID3 + encoded(container, subtype))
    assert len(read_audio(path)) == 2 * RATE
    assert audio_duration(path) == pytest.approx(2)


@pytest.mark.parametrize("subtype", ["GSM610", "ULAW", "ALAW", "G721_32", "IMA_ADPCM", "MS_ADPCM"])
def test_telephone_codecs_in_wav(tmp_path, subtype):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded("WAV", subtype, rate=8000))
    waveform = read_audio(path)
    assert len(waveform) == pytest.approx(2 * RATE, abs=1500)  # whole blocks of the codec
    assert pitch(waveform) == pytest.approx(440, abs=2)


def lenient(path):
    """What is there of a file, and what is said of the rest."""
    said: list[str] = []
    blocks = list(read_blocks(path, incomplete=said.append))
    return np.concatenate(blocks), said


@pytest.mark.parametrize(
    ("container", "subtype"), [*KINDS, ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("W64", "PCM_16"),
                               ("RF64", "PCM_16"), ("WAV", "GSM610"), ("CAF", "PCM_16"),
                               ("NIST", "PCM_16"), ("NIST", "ULAW")],
)  # fmt: skip
def test_what_is_there_of_a_cut_file_is_read_and_the_rest_said(tmp_path, container, subtype):
    path = tmp_path / "cut"
    whole = encoded(container, subtype, rate=8000 if subtype == "GSM610" else RATE)
    path.write_bytes(whole[: int(0.7 * len(whole))])
    with pytest.raises(AudioError, match=r"truncated|damaged"):
        read_audio(path)
    if subtype in ("VORBIS", "PCM_16") and container in ("OGG", "FLAC"):
        return  # libsndfile reads nothing of so short a one
    waveform, (said,) = lenient(path)
    assert 0.3 * 2 * RATE < len(waveform) < 0.9 * 2 * RATE
    assert str(path) in said
    assert "truncated" in said


OTHERS = [
    ("AVR", "PCM_16"), ("AVR", "PCM_U8"), ("MAT4", "PCM_16"), ("MAT4", "DOUBLE"),
    ("MAT5", "PCM_U8"), ("MAT5", "FLOAT"), ("MPC2K", "PCM_16"), ("PAF", "PCM_24"),
    ("SVX", "PCM_16"), ("VOC", "PCM_16"), ("VOC", "ULAW"), ("W64", "GSM610"), ("W64", "MS_ADPCM"),
    ("WVE", "ALAW"), ("XI", "DPCM_16"), ("XI", "DPCM_8"),
]  # fmt: skip


def of_other_kind(container, subtype):
    """A whole file, with a length in its header where the format has one."""
    data = encoded(container, subtype, rate=8000 if container == "WVE" else RATE)
    if container == "XI":  # libsndfile writes a size of 0
        size = 2 * RATE * (2 if subtype == "DPCM_16" else 1)
        place = len(data) - size - 40
        assert data[place : place + 4] == bytes(4)
        data = data[:place] + struct.pack("<I", size) + data[place + 4 :]
    return data


@pytest.mark.parametrize(("container", "subtype"), OTHERS)
def test_cut_files_of_other_formats_are_said_too(tmp_path, container, subtype):
    path = tmp_path / "a"
    data = of_other_kind(container, subtype)
    path.write_bytes(data)
    whole = read_audio(path)
    path.write_bytes(data[: int(0.7 * len(data))])
    with pytest.raises(AudioError, match="truncated"):
        read_audio(path)
    waveform, (said,) = lenient(path)
    assert len(waveform) == pytest.approx(0.7 * len(whole), rel=0.03)
    assert str(path) in said
    assert "truncated" in said


@pytest.mark.parametrize(
    ("container", "subtype"), [*OTHERS, ("PAF", "PCM_16"), ("PVF", "PCM_16"), ("IRCAM", "PCM_16"),
                               ("SDS", "PCM_16"), ("HTK", "PCM_16"), ("CAF", "ALAC_16")],
)  # fmt: skip
def test_nothing_behind_the_samples_of_other_formats_is_lost_unsaid(tmp_path, container, subtype):
    path = tmp_path / "a"
    data = of_other_kind(container, subtype)
    path.write_bytes(data)
    whole = len(read_audio(path))
    path.write_bytes(data + b"\x90\x01" * 4000)  # as floats they are finite too
    if container == "HTK":  # libsndfile wants its length to be right
        with pytest.raises(AudioError, match="damaged"):
            lenient(path)
        return
    waveform, said = lenient(path)
    if said:
        assert "8000 bytes behind" in said[0] or "8001 bytes behind" in said[0]
        assert len(waveform) == whole
        with pytest.raises(AudioError, match="damaged"):
            read_audio(path)
    else:
        assert len(waveform) > whole + 500


@pytest.mark.parametrize("size", [0, 1000])
@pytest.mark.parametrize("container", ["WAV", "AU", "RF64", "AIFF", "CAF"])
def test_samples_behind_what_the_header_counts_are_read(tmp_path, container, size):
    data = bytearray(encoded(container, "PCM_16"))
    if container == "WAV":
        at = data.find(b"data") + 4
        data[at : at + 4] = struct.pack("<I", size)
    elif container == "AU":
        data[8:12] = struct.pack(">I", size)
    elif container == "AIFF":
        at = data.find(b"SSND") + 4
        data[at : at + 4] = struct.pack(">I", size)
    elif container == "CAF":
        at = data.find(b"data") + 4
        data[at : at + 8] = struct.pack(">Q", size)
    else:
        at = data.find(b"ds64") + 16
        data[at : at + 8] = struct.pack("<Q", size)
    data[-2000:] = np.full(1000, -20000, "<i2" if container in ("WAV", "RF64") else ">i2").tobytes()
    path = tmp_path / "a"
    path.write_bytes(data)
    waveform = read_audio(path)
    assert len(waveform) == pytest.approx(2 * RATE, abs=30)
    assert waveform[-500] == pytest.approx(-20000 / 32768)


def test_stereo_that_cancels_is_not_silence(tmp_path):
    left = tone(440)
    soundfile.write(tmp_path / "a.wav", np.stack([left, -left], axis=1), RATE)
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), left, atol=1e-3)


def test_one_channel_is_chosen(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([tone(440), tone(1000)], axis=1), RATE)
    for channel, hertz in enumerate((440, 1000)):
        (block,) = read_blocks(path, channel=channel)
        np.testing.assert_allclose(block, tone(hertz), atol=1e-3)
    with pytest.raises(AudioError, match="no channel 3, only 2"):
        list(read_blocks(path, channel=2))


def test_a_stray_sample_does_not_silence_a_file(tmp_path):
    samples = tone(440)
    samples[9000] = 1e6
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    waveform = read_audio(tmp_path / "a.wav")
    assert np.abs(waveform).max() == pytest.approx(0.5, abs=0.01)


def test_a_long_file_comes_in_blocks(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, np.tile(tone(440, 10, 48000), 20), 48000)
    blocks = [len(block) for block in read_blocks(path)]
    assert len(blocks) > 5
    assert max(blocks) <= 1 << 20
    assert sum(blocks) == 200 * RATE
