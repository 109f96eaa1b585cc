"""People's own data through scripts/prepare_data.py, one small corpus of each layout."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from importlib import import_module

import pytest

from asr.corpus import prepare
from asr.corpus.english import spoken
from asr.corpus.manifest import ManifestError, read_manifest
from asr.network.checkpoint import Checkpoint, save_checkpoint
from asr.runtime.tokenizer import Tokenizer
from tests.conftest import build_tiny_model
from tests.test_prepare_data import write_audio

main = import_module("scripts.prepare_data").main


def common_voice(folder):
    for name in ("one", "two"):
        write_audio(folder / "clips" / f"{name}.wav")
    lines = ["client_id\tpath\tsentence\tup_votes", 'a1\tone.wav\tSay "yes\t2', "b2\ttwo\tNo\t2"]
    (folder / "validated.tsv").write_text("\n".join(lines))
    return folder, {"one": ("say yes", "a1"), "two": ("no", "b2")}


def table(folder):
    for name in ("one", "two"):
        write_audio(folder / "audio" / f"{name}.flac")
    lines = ["filename,transcript", '"audio/one.flac","yes, sir"', "audio/two.flac,no"]
    (folder / "mine.csv").write_text("\n".join(lines))
    return folder / "mine.csv", {"one": ("yes, sir", ""), "two": ("no", "")}


def pairs(folder):
    for name, text in (("ann/one", "Yes"), ("ben/two", "No\n")):
        write_audio(folder / f"{name}.wav")
        (folder / f"{name}.txt").write_text(text)
    write_audio(folder / "ben" / "three.wav")
    return folder, {"one": ("yes", "ann"), "two": ("no", "ben")}


def kaldi(folder):
    write_audio(folder / "wav" / "one.wav")
    write_audio(folder / "wav" / "two.wav")
    (folder / "wav.scp").write_text(f"u1 wav/one.wav\nu2 {folder}/wav/two.wav\n")
    (folder / "text").write_text("u1 YES\nu2 NO\n")
    (folder / "utt2spk").write_text("u1 s1\nu2 s2\n")
    return folder, {"u1": ("yes", "s1"), "u2": ("no", "s2")}


def nemo(folder):
    for name in ("one", "two"):
        write_audio(folder / f"{name}.wav")
    texts = {"one.wav": "Yes", "two.wav": "No"}
    entries = [{"audio_filepath": name, "text": text} for name, text in texts.items()]
    (folder / "mine.json").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder / "mine.json", {"one": ("yes", ""), "two": ("no", "")}


@pytest.mark.parametrize("layout", [common_voice, table, pairs, kaldi, nemo])
def test_what_people_have_is_read(layout, tmp_path, capsys):
    source, expected = layout(tmp_path / "corpus")
    letters = "abcdefghijklmnopqrstuvwxyz'\","
    arguments = ["--data_dir", source, "--output_dir", tmp_path / "out", "--alphabet", letters]
    assert main([str(a) for a in arguments]) == 0
    (manifest,) = (tmp_path / "out").glob("*.json")
    found = {u.id: (u.text.replace('"', ""), u.speaker) for u in read_manifest(manifest)}
    assert found == expected
    assert all(u.duration == pytest.approx(1.0) for u in read_manifest(manifest))
    if layout is pairs:
        assert "1 no transcript: three" in capsys.readouterr().out


@pytest.mark.parametrize("layout", [table, pairs, nemo])
def test_texts_are_as_the_model_that_learns_them_writes(layout, tmp_path, capsys):
    """With their capitals and signs, for a model that has such tokens."""
    tokens = ["<blk>", "▁Yes", "▁", ",", *"yesirNo", "▁no", "▁sir"]  # and no way to cut a text
    model = build_tiny_model(vocab_size=len(tokens), subsampling_factor=8)
    save_checkpoint(tmp_path / "model.pt", Checkpoint(model, Tokenizer(tokens)))
    source, _ = layout(tmp_path / "corpus")
    arguments = ["--data_dir", source, "--output_dir", tmp_path / "out", "--model_path"]
    assert main([str(a) for a in [*arguments, tmp_path / "model.pt"]]) == 2
    assert "pieces of words" in capsys.readouterr().err
    tokens = ["<blk>", "▁", *dict.fromkeys("yesirnYN,o")]
    model = build_tiny_model(vocab_size=len(tokens), subsampling_factor=8)
    save_checkpoint(tmp_path / "model.pt", Checkpoint(model, Tokenizer(tokens)))
    assert main([str(a) for a in [*arguments, tmp_path / "model.pt"]]) == 0
    (manifest,) = (tmp_path / "out").glob("*.json")
    expected = {"one": "yes, sir", "two": "no"} if layout is table else {"one": "Yes", "two": "No"}
    assert {u.id: u.written for u in read_manifest(manifest)} == expected
    assert main([str(a) for a in [*arguments, tmp_path / "model.pt", "--alphabet", "ab"]]) == 2
    assert "--model_path" in capsys.readouterr().err


def test_frames_are_counted_in_the_models_tokens(tmp_path):
    """A second is 13 frames at 8x: 23 letters do not fit, eight pieces of them do."""
    texts = [" ".join(random.Random(n).choices(["ab", "cd", "ef"], k=12)) for n in range(50)]
    write_audio(tmp_path / "corpus" / "one.wav")
    (tmp_path / "corpus" / "one.txt").write_text("ab cd ef ab cd ef ab cd")
    rules = prepare.Rules(subsampling_factor=8)
    with pytest.raises(ManifestError, match="text longer than the frames"):
        prepare.prepare("x", tmp_path / "corpus", rules)
    rules = replace(rules, tokenizer=Tokenizer.bpe(texts, 12))
    (kept,) = prepare.prepare("x", tmp_path / "corpus", rules).utterances
    assert kept.text == "ab cd ef ab cd ef ab cd"


def test_a_table_without_the_columns_says_which(tmp_path, capsys):
    (tmp_path / "mine.tsv").write_text("clip\twords\na.wav\tyes\n")
    arguments = ["--data_dir", tmp_path / "mine.tsv", "--output_dir", tmp_path / "out"]
    assert main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert "clip, words" in error
    assert error.count("\n") == 1


def test_commands_in_a_kaldi_folder_are_refused(tmp_path, capsys):
    folder, _ = kaldi(tmp_path / "corpus")
    (folder / "wav.scp").write_text("u1 sph2pipe a.sph |\n")
    arguments = ["--data_dir", folder, "--output_dir", tmp_path / "out"]
    assert main([str(a) for a in arguments]) == 2
    assert "u1 is a command" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            "In 1995 Dr. Smith paid $20",
            "in nineteen ninety five doctor smith paid twenty dollars",
        ),
        ("The 3rd of 1,204 items", "the third of one thousand two hundred and four items"),
        ("It's 3.5 km & 7:05", "it's three point five kilometers and seven oh five"),
        ("50% of No. 7", "fifty percent of number seven"),
        ("“Naïve” — don’t!", "naive don't"),
        ("£1.50 or €2", "one pound fifty or two euros"),
        ("already plain words", "already plain words"),
        ("9" * 400, " ".join(["nine"] * 400)),
    ],
)
def test_english_is_written_as_it_is_spoken(written, said):
    assert spoken(written) == said


def test_normalised_texts_keep_what_would_be_left_out(tmp_path):
    source, _ = table(tmp_path / "corpus")
    source.write_text("filename,transcript\naudio/one.flac,Room 101!\n")
    arguments = ["--data_dir", source, "--output_dir", tmp_path / "out", "--normalize_text", "en"]
    assert main([str(a) for a in arguments]) == 0
    (utterance,) = read_manifest(tmp_path / "out" / "mine.json")
    assert utterance.text == "room one hundred and one"
