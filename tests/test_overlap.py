"""What sets of transcripts have in common, and the commands that count and leave out."""

import json

import pytest

from asr.corpus.transcripts import Line, overlap, read_lines, without, words_of
from experiments import check_overlap
from scripts import build_lm
from tests.arpa import Arpa

TRANSCRIPTS = """103-1240-0000 CHAPTER ONE
103-1240-0001 SHE SAID  YES
103-1241-0002 YES
200-7-0000 A SENTENCE THAT STANDS IN A TEST SET
"""


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "train.trans.txt"
    path.write_text(TRANSCRIPTS)
    return path


@pytest.fixture
def manifest(tmp_path):
    rows = [
        {"text": "A sentence that stands in a test set.", "speaker": "9", "id": "9-1-1"},
        {"text": "yes", "speaker": "103", "id": "9-1-2"},
        {"text": "nothing like it", "speaker": "9", "id": "103-1241-0002"},
    ]
    path = tmp_path / "test.json"
    path.write_text(
        "".join(json.dumps(r | {"audio_filepath": "x.wav", "duration": 1}) + "\n" for r in rows)
    )
    return path


def test_transcript_files_bring_ids_and_speakers(text):
    lines = read_lines(text)
    assert lines[1] == Line("103-1240-0001", "103", "she said yes")
    assert [line.speaker for line in lines] == ["103", "103", "103", "200"]


def test_plain_text_and_folders(tmp_path):
    plain = tmp_path / "book.txt"
    plain.write_text("\ufeff“Don’t go,” she said.\n\nWell-known words\n", encoding="utf-8")
    assert [words_of(line.text) for line in read_lines(plain)] == [
        "don't go she said".split(), "well known words".split()
    ]  # fmt: skip
    chapter = tmp_path / "test-clean" / "103" / "1240"
    chapter.mkdir(parents=True)
    (chapter / "103-1240.trans.txt").write_text(TRANSCRIPTS)  # no audio is needed
    assert read_lines(tmp_path / "test-clean") == sorted(read_lines(tmp_path))
    assert read_lines(tmp_path / "test-clean")[0] == Line("103-1240-0000", "103", "chapter one")


def test_overlap(text, manifest):
    found = overlap(read_lines(text), read_lines(manifest))
    assert found == {
        "utterances": 3,
        "shared_utterances": 1,
        "speakers": 2,
        "shared_speakers": 1,
        "shared_sentences": 1,
        "shared_single_words": 1,
        "examples": {
            "utterances": ["103-1241-0002"],
            "speakers": ["103"],
            "sentences": ["9-1-1: a sentence that stands in a test set"],
        },
    }


def test_unknown_ids_and_speakers_are_not_shared(tmp_path):
    (tmp_path / "a.txt").write_text("one two\n")
    lines = read_lines(tmp_path / "a.txt")
    found = overlap(lines, lines)
    assert (found["shared_utterances"], found["shared_speakers"]) == (0, 0)
    assert found["shared_sentences"] == 1
    assert without(lines, lines) == []


def test_check_overlap_prints_and_writes(text, manifest, tmp_path, capsys):
    out = tmp_path / "new" / "overlap.json"
    flags = ["--train", str(text), "--test", str(manifest), "--output_path", str(out)]
    assert check_overlap.main(flags) == 0
    printed = capsys.readouterr().out
    assert "1 of 3 utterances, 1 of 2 speakers, 1 sentences, 1 single words" in printed
    assert "9-1-1: a sentence that stands" in printed
    result = json.loads(out.read_text())
    assert result["overlaps"][0]["shared_sentences"] == 1
    assert str(tmp_path) not in out.read_text()
    assert check_overlap.main([*flags, "--no_texts"]) == 0
    result = json.loads(out.read_text())
    assert result["overlaps"][0]["examples"]["sentences"] == ["9-1-1"]
    assert "a sentence that stands" not in out.read_text() + capsys.readouterr().out


def test_check_overlap_says_where_speakers_are_unknown(text, manifest, tmp_path, capsys):
    nameless = tmp_path / "nameless.json"
    nameless.write_text('{"audio_filepath": "a.wav", "duration": 1, "text": "yes"}\n')
    out = tmp_path / "overlap.json"
    flags = ["--output_path", str(out)]
    for train, test, speakers, shared, said in (
        (text, manifest, 2, 1, "1 of 2 speakers"),
        (nameless, manifest, 2, None, "speakers unknown"),
        (text, nameless, None, None, "speakers unknown"),
        (nameless, nameless, None, None, "speakers unknown"),
    ):
        assert check_overlap.main([*flags, "--train", str(train), "--test", str(test)]) == 0
        assert f" utterances, {said}, " in capsys.readouterr().out
        result = json.loads(out.read_text())
        (row,) = result["overlaps"]
        assert (row["speakers"], row["shared_speakers"]) == (speakers, shared)
        assert result["machine"]["cores"] >= 1


def test_build_lm_leaves_out_the_sentences_of_test_sets(text, manifest, tmp_path, capsys):
    path = tmp_path / "lm.arpa"
    flags = ["--text", str(text), "--exclude", str(manifest), "--output_path", str(path)]
    assert build_lm.main([*flags, "--order", "3", "--prune", "0"]) == 0
    printed = capsys.readouterr().out
    assert f"left out 2 sentences of {manifest}" in printed
    assert "2 of 4 sentences, 5 words" in printed
    assert set(Arpa(path).words) == {"<unk>", "<s>", "</s>", *"chapter one she said yes".split()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "no.txt"], "no such file or folder"),
        (["--text", "empty.txt"], "empty.txt: no text in it"),
        (["--text", "a.txt", "--exclude", "a.txt"], "no words in the text"),
        (["--text", "a.txt", "--order", "9"], "order 9 must be from 1 to 6"),
        (["--text", "a.txt", "--output_path", "lm.bin"], "must end in .lm or .arpa"),
        (["--text", "latin.txt"], "not UTF-8 text"),
    ],
)
def test_build_lm_explains_mistakes(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one two\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1"))
    output = [] if "--output_path" in flags else ["--output_path", "lm.arpa"]
    assert build_lm.main([*flags, *output]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*lm*"))
