"""What may be named besides a plain file: pipes, standard input, open files, addresses, m4a."""

import io
import os
import shutil
import socket
import sys
import threading

import numpy as np
import pytest
import soundfile

from asr.runtime import sources
from asr.runtime.audio import read_audio
from asr.runtime.files import printable
from asr.runtime.sources import AudioError

RATE = 16000
SAMPLES = (0.3 * np.sin(np.arange(RATE) * 0.3)).astype(np.float32)


def wav():
    buffer = io.BytesIO()
    soundfile.write(buffer, SAMPLES, RATE, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


@pytest.fixture
def fifo(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def test_a_pipe_is_read(fifo):
    writer = threading.Thread(target=lambda: fifo.write_bytes(wav()))
    writer.start()
    np.testing.assert_array_equal(read_audio(fifo), SAMPLES)
    writer.join()


def test_standard_input_is_read(monkeypatch, tmp_path):
    (tmp_path / "a.wav").write_bytes(wav())
    read, write = os.pipe()

    def send():
        with open(write, "wb") as file:
            file.write(wav())

    threading.Thread(target=send).start()
    with open(read) as piped, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", piped)
        np.testing.assert_array_equal(read_audio("-"), SAMPLES)
    with open(tmp_path / "a.wav") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", file)
        np.testing.assert_array_equal(read_audio("-"), SAMPLES)


def test_a_pipe_that_never_delivers_ends(fifo, monkeypatch):
    monkeypatch.setattr(sources, "PATIENCE", 0.1)
    with pytest.raises(AudioError, match="nothing came for"):  # nobody writes
        read_audio(fifo)
    silent = os.open(fifo, os.O_RDWR)
    with pytest.raises(AudioError, match="nothing came for"):  # somebody does not
        read_audio(fifo)
    os.close(silent)


def test_open_files_are_read(tmp_path):
    buffer = io.BytesIO(wav())
    np.testing.assert_array_equal(read_audio(buffer), SAMPLES)
    assert not buffer.closed
    behind = io.BytesIO(b"before" + wav())
    behind.seek(6)
    np.testing.assert_array_equal(read_audio(behind), SAMPLES)
    (tmp_path / "a.wav").write_bytes(wav())
    with open(tmp_path / "a.wav", "rb") as file:
        np.testing.assert_array_equal(read_audio(file), SAMPLES)
    with pytest.raises(AudioError, match=r"a\.wav.*text"), open(tmp_path / "a.wav") as text:
        read_audio(text)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("https://example.org/a.wav", "web address"),
        ("/dev/zero", "not a regular file"),
        ("a\0b.wav", "cannot be read"),
    ],
)
def test_what_is_no_file_is_named(path, message):
    with pytest.raises(AudioError, match=message) as info:
        read_audio(path)
    assert "\n" not in str(info.value)


def test_a_socket_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # such names are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("door")
        with pytest.raises(AudioError, match="not a regular file"):
            read_audio("door")


def test_names_of_odd_bytes_are_read_and_shown(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n\t.wav")
    with pytest.raises(AudioError) as info:
        read_audio(path)
    assert "caf\\xe9\\n\\t.wav" in str(info.value)
    with open(path, "wb") as file:
        file.write(wav())
    np.testing.assert_array_equal(read_audio(path), SAMPLES)
    assert printable("日本 é.wav") == "日本 é.wav"


def test_m4a_needs_ffmpeg(tmp_path, monkeypatch):
    path = tmp_path / "a.m4a"
    path.write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(AudioError, match=r"needs ffmpeg; install it \(apt-get install ffmpeg\)"):
        read_audio(path)


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg: apt-get install ffmpeg")
@pytest.mark.parametrize("suffix", ["m4a", "aac"])
def test_ffmpeg_reads_what_libsndfile_does_not(tmp_path, suffix):
    import subprocess

    soundfile.write(tmp_path / "a.wav", np.repeat(SAMPLES, 3), 48000)
    path = tmp_path / f"a.{suffix}"
    subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", path], check=True)
    assert len(read_audio(path)) == pytest.approx(RATE, abs=2500)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AudioError, match="ffmpeg"):
        read_audio(path)
