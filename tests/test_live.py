"""Text while somebody speaks: events, the command's --stdin and --microphone, Ctrl-C."""

import io
import json
import signal
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from asr.corpus.splits import read_source
from asr.runtime import capture
from asr.runtime.audio import read_audio
from asr.runtime.recognizer import load
from asr.runtime.transcribe import main

ROOT = Path(__file__).resolve().parents[1]
RATE = 16000


@pytest.fixture(scope="module")
def speech():
    """Six sentences of the built-in corpus, (N,) int16; after each third a pause of 1.5 s."""
    sentences = [read_audio(u.audio_filepath) for u in read_source(ROOT / "data/mini/dev.json")[:6]]
    pause = np.zeros(int(1.5 * RATE), np.float32)
    waveform = np.concatenate([*sentences[:3], pause, *sentences[3:], pause])
    waveform += 1e-4 * np.random.default_rng(0).standard_normal(len(waveform), np.float32)
    return (waveform * 32767).astype(np.int16)


@pytest.fixture(scope="module")
def reader():
    return load(threads=1, beam=False)


@pytest.fixture(scope="module")
def events(reader, speech):
    """What is heard of `speech` in chunks of odd lengths."""
    lengths = np.random.default_rng(1).integers(1, 4000, 400).cumsum()
    return list(reader.listen(np.split(speech, lengths[lengths < len(speech)])))


def words(events):
    return [word for event in events for word in event.segment.words]


def test_final_words_are_those_of_the_file(reader, speech, events):
    final = words(e for e in events if e.final)
    expected = reader.transcribe(speech).words
    assert [w.text for w in final] == [w.text for w in expected]
    assert len(final) > 20
    assert [(w.start, w.end) for w in final] == [(w.start, w.end) for w in expected]


def test_words_show_before_they_are_final(events):
    """At least two in three, and what is final never comes again."""
    settled, early, shown = 0.0, 0, set()
    for event in events:
        assert event.segment.start >= settled
        if event.final:
            settled = event.segment.end
            early += sum(word.text in shown for word in event.segment.words)
        else:
            shown |= {word.text for word in event.segment.words}
    final = words(e for e in events if e.final)
    assert early >= 2 / 3 * len(final)
    assert all(a.end <= b.start for a, b in pairwise(final))
    assert sum(not e.final for e in events) > 10


def test_another_rate_is_resampled(reader, speech):
    twice = np.repeat(speech[: 5 * RATE], 2)
    once = list(reader.listen([speech[: 5 * RATE]]))
    found = list(reader.listen(np.array_split(twice, 30), sample_rate=2 * RATE))
    said = [" ".join(e.segment.text for e in part if e.final) for part in (once, found)]
    assert len(set(said[0].split()) & set(said[1].split())) > 0.6 * len(said[0].split())


def test_silence_noise_and_nothing_are_not_heard(reader):
    noise = (300 * np.random.default_rng(0).standard_normal(8 * RATE)).astype(np.int16)
    for sound in (noise, np.zeros(8 * RATE, np.int16), np.zeros(0, np.int16)):
        assert list(reader.listen(np.array_split(sound, 40))) == []


def test_memory_is_that_of_what_is_not_final_yet(reader):
    from asr.runtime.live import Listener

    listener = Listener(reader, RATE)
    for _ in range(150):
        assert list(listener.feed(np.zeros(RATE, np.int16))) == []
    assert len(listener._cutter.waveform) < 2 * RATE


# ---- the command ----------------------------------------------------------------------------


def stdin(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


def test_raw_samples_on_standard_input(reader, speech, monkeypatch, capsys, tmp_path):
    stdin(monkeypatch, speech.tobytes() + b"\0")  # half a sample at the end
    assert main(["--stdin", "--lm", "none", "--output_format", "json", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    entries = [json.loads(line) for line in out.splitlines()]
    assert err == ""
    assert {e["final"] for e in entries} == {True, False}
    text = " ".join(e["text"] for e in entries if e["final"])
    assert text == reader.transcribe(speech).text
    assert all(w["start"] <= w["end"] for e in entries for w in e["words"])

    stdin(monkeypatch, speech.tobytes())
    target = tmp_path / "said.txt"
    assert main(["--stdin", "--lm", "none", "--output_path", str(target), "--threads", "1"]) == 0
    assert target.read_text().replace("\n", " ").strip() == text


def test_ctrl_c_prints_what_was_being_said(reader, speech, monkeypatch, capsys):
    """Once while the command waits for sound and once while it works."""
    before = signal.getsignal(signal.SIGINT)

    def interrupted(chunks):
        yield from chunks[:25]
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on after Ctrl-C")

    chunks = [speech[at : at + 1600] for at in range(0, len(speech), 1600)]
    monkeypatch.setattr("asr.runtime.transcribe.from_microphone", lambda _: interrupted(chunks))
    assert main(["--microphone", "--threads", "1"]) == 0
    waiting = capsys.readouterr().out
    assert len(waiting.split()) >= 3
    assert waiting.count("\n") == len(waiting.splitlines())

    heard = []
    for chunk in capture.until_interrupted(chunks):
        heard.append(chunk)
        if len(heard) == 25:
            signal.raise_signal(signal.SIGINT)
    assert len(heard) == 25
    assert signal.getsignal(signal.SIGINT) == before


class Silent:
    """Stands in for sounddevice: a stream that calls back once, or no device at all."""

    PortAudioError = OSError

    def __init__(self, broken=False):
        self.broken = broken

    def InputStream(self, samplerate, channels, dtype, blocksize, callback):  # noqa: N802
        assert (channels, dtype) == (1, "int16")
        if self.broken:
            raise OSError("Error querying device -1")
        callback(np.arange(blocksize, dtype=np.int16)[:, None], blocksize, None, None)
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_the_microphone_gives_chunks(monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", Silent())
    chunk = next(capture.from_microphone(RATE))
    assert chunk.tolist() == list(range(1600))


def test_mistakes_are_named(monkeypatch, capsys):
    cases = {
        ("--stdin", "a.wav"): "name audio files or folders, or --microphone, or --stdin",
        ("--microphone", "--sample_rate", "8000"): "--sample_rate is that of --stdin",
        ("--stdin", "--output_format", "srt"): "written as text or json",
        ("--microphone", "--threads", "1"): "pip install sounddevice",
    }
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    for flags, message in cases.items():
        assert main([*flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    monkeypatch.setitem(sys.modules, "sounddevice", Silent(broken=True))
    assert main(["--microphone", "--threads", "1"]) == 2
    assert "no microphone that can be opened" in capsys.readouterr().err
    for rate in ("100", "-5", "0"):
        stdin(monkeypatch, b"\0\0" * 16000)
        assert main(["--stdin", "--sample_rate", rate, "--threads", "1"]) == 2
        assert f"{rate} Hz is not usable" in capsys.readouterr().err
