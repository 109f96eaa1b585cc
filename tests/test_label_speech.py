"""Texts for recordings without any, by a model."""

from pathlib import Path
from types import SimpleNamespace

import asr
from asr.corpus.manifest import Utterance, read_manifest, write_manifest
from scripts import label_speech
from scripts.label_speech import main
from tests.corpus import write_corpus


def unlabelled(tmp_path):
    """A manifest without texts, one of its recordings unreadable; and the one with texts."""
    data = write_corpus(tmp_path / "data", per_text=1)
    known = read_manifest(data / "dev.json")
    path = data / "silent.json"
    path.write_bytes((data / "dev.json").read_bytes())
    write_manifest(path, [u.__class__(**{**vars(u), "text": ""}) for u in known])
    (data / f"{known[0].id}.wav").write_bytes(b"no audio")
    return path, data / "dev.json"


def flags(*given):
    return [str(flag) for flag in given]


def test_recordings_get_the_texts_that_the_model_hears(tiny_checkpoint, tmp_path, capsys):
    path, known = unlabelled(tmp_path)
    out = tmp_path / "train-heard.json"
    assert main(flags("--model_path", tiny_checkpoint, "--data_dir", path, "--output_path", out,
                      "--min_confidence", 0, "--test_data", known)) == 0  # fmt: skip
    said = capsys.readouterr()
    assert "left out: " in said.err
    assert "confidence  speech kept  WER of it" in said.out
    recognizer = asr.load(tiny_checkpoint, min_confidence=0)
    kept = read_manifest(out)
    expected = [recognizer.transcribe(u.audio_filepath).text for u in read_manifest(path)[1:]]
    assert kept
    assert [u.text for u in kept] == [text for text in expected if text]


def test_unsure_texts_are_left_out(tiny_checkpoint, tmp_path, capsys):
    path, _ = unlabelled(tmp_path)
    out = tmp_path / "train-heard.json"
    wanted = flags("--model_path", tiny_checkpoint, "--data_dir", path, "--output_path", out)
    assert main([*wanted, "--min_confidence", "1"]) == 2
    assert "none of the recordings" in capsys.readouterr().err
    assert not out.exists()


def test_texts_of_another_recogniser_are_kept_where_both_agree(tmp_path, monkeypatch, capsys):
    said = {"a": "one two three", "b": "one too free", "c": "", "d": "alone"}
    recognizer = SimpleNamespace(
        worded=True,
        transcribe=lambda path: SimpleNamespace(text=said[Path(path).stem], confidence=0.1),
    )
    monkeypatch.setattr(label_speech, "load", lambda *_, **__: recognizer)
    paths = [str(tmp_path / f"{name}.wav") for name in said]
    write_manifest(tmp_path / "silent.json", [Utterance(path, 1.0, "") for path in paths])
    other = [Utterance(path, 1.0, "one two free") for path in paths[:3]]
    write_manifest(tmp_path / "other.json", other)
    wanted = flags("--data_dir", tmp_path / "silent.json", "--output_path", tmp_path / "out.json",
                   "--agree_with", tmp_path / "other.json")  # fmt: skip
    assert main(wanted) == 0
    kept = read_manifest(tmp_path / "out.json")
    assert [(u.id, u.text) for u in kept] == [("a", "one two free"), ("b", "one two free")]
    assert main([*wanted, "--max_difference", "0.3"]) == 2
    assert "at most 0.3 of the words other than in" in capsys.readouterr().err
    assert main([*wanted, "--min_confidence", "0.3"]) == 2


def test_a_language_model_must_be_surer(tmp_path, monkeypatch):
    """What is kept by default is as right with one as without: 0.8 there is 0.95 here."""
    for worded, kept in ((False, ["a", "b"]), (True, ["b"])):
        recognizer = SimpleNamespace(
            worded=worded,
            transcribe=lambda path: SimpleNamespace(
                text=Path(path).stem, confidence={"a": 0.9, "b": 0.97, "c": 0.7}[Path(path).stem]
            ),
        )
        monkeypatch.setattr(label_speech, "load", lambda *_, given=recognizer, **__: given)
        silent = [Utterance(f"{name}.wav", 1.0, "") for name in "abc"]
        monkeypatch.setattr(label_speech, "unlabelled", lambda path, given=silent: given)
        out = tmp_path / f"train-{worded}.json"
        assert main(flags("--data_dir", "any", "--output_path", out)) == 0
        assert [u.text for u in read_manifest(out)] == kept
