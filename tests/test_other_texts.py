"""Recordings and references as other people have them: unreadable, mistimed, with digits."""

import json
import math
from dataclasses import replace

import pytest

from asr.corpus.manifest import read_manifest, write_manifest
from asr.measure.evaluate import main as evaluate
from asr.measure.scores import unwritable
from tests.corpus import write_corpus


@pytest.fixture
def data(tmp_path):
    return write_corpus(tmp_path / "data", per_text=1) / "dev.json"


@pytest.fixture
def measured(tiny_checkpoint, tmp_path, capsys):
    """Runs evaluate.py; its exit code, result and what it wrote to stdout and stderr."""

    def run(*flags):
        out = tmp_path / "result.json"
        out.unlink(missing_ok=True)
        code = evaluate([
            "--model_path", str(tiny_checkpoint), "--threads", "1", "--output_path", str(out),
            *map(str, flags),
        ])  # fmt: skip
        result = json.loads(out.read_text()) if out.exists() else None
        return code, result, *capsys.readouterr()

    return run


def rows(result):
    return {row["id"]: row for row in result["utterances"]}


@pytest.mark.parametrize("damage", ["missing", "garbage", "empty", "folder"])
def test_one_unreadable_recording_does_not_lose_the_rest(measured, data, damage, tmp_path):
    again = data.parent / "again.json"
    again.write_bytes(data.read_bytes())
    _, whole, _, _ = measured("--test_data", data, again, "--no_speed")
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    utterances = read_manifest(data)
    victim = data.parent / f"{utterances[1].id}.wav"
    victim.unlink()
    if damage == "folder":
        victim.mkdir()
    elif damage != "missing":
        victim.write_bytes(b"no audio" * 50 if damage == "garbage" else b"")
    code, result, _, error = measured(
        "--test_data", data, again, "--no_speed", "--compare", tmp_path / "whole.json"
    )
    assert code == 2
    assert [row["id"] for row in result["failed"]] == [victim.stem] * 2
    assert all(str(victim) in row["error"] for row in result["failed"])
    assert f"error: {victim.stem}: " in error
    assert f"2 of {2 * len(utterances)} recordings do not count" in error
    expected = rows(whole)
    del expected[victim.stem]
    assert rows(result) == expected
    assert [part["utterances"] for part in result["sets"]] == [len(utterances) - 1] * 2
    assert result["comparison"]["utterances"] == 2 * len(utterances) - 2
    assert result["comparison"]["wer"]["delta"] == 0


def test_nothing_readable_is_an_error_of_one_line(measured, data):
    for path in data.parent.glob("*.wav"):
        path.write_bytes(b"")
    code, result, _, error = measured("--test_data", data, "--no_speed")
    assert (code, result) == (2, None)
    assert "no recording can be read; the first: " in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("duration", [0.0, 1e-9, 1e6])
def test_wrong_durations_give_no_infinity(measured, data, duration):
    utterances = [replace(u, duration=duration) for u in read_manifest(data)[:3]]
    write_manifest(data.parent / "wrong.json", utterances)
    code, result, printed, _ = measured("--test_data", data.parent / "wrong.json")
    assert code == 0
    assert 0 < result["rtf"] < 100
    assert "inf" not in printed.lower().split()
    assert all(math.isfinite(speed["rtf"]) for speed in result["speed"])


def test_references_that_the_model_cannot_write_are_pointed_out(measured, data):
    utterances = read_manifest(data)
    texts = ["a 5, b", "5\u200bé", *(u.text for u in utterances[2:])]
    others = [replace(u, text=text) for u, text in zip(utterances, texts, strict=True)]
    write_manifest(data.parent / "others.json", others)
    _, result, printed, _ = measured("--test_data", data.parent / "others.json", "--no_speed")
    named = {"'5'": 2, "','": 1, "U+200B ZERO WIDTH SPACE": 1, "'é'": 1}
    assert named.items() <= result["unwritable"].items()
    assert "characters that the model cannot write: '5' in 2, " in printed
    assert "--normalize leaves out punctuation" in printed
    _, result, printed, _ = measured("--test_data", data, "--no_speed")
    assert not result["unwritable"].keys() & named
    assert unwritable([replace(utterances[0], text="ab b")], ["<blk>", "▁a", "b"]) == {}


def test_normalised_texts_are_compared_as_they_are_said(measured, data, tmp_path):
    utterances = read_manifest(data)
    texts = ["A, B!", "21 c.", "In 1995, 21st", *(u.text for u in utterances[3:])]
    others = [replace(u, text=text) for u, text in zip(utterances, texts, strict=True)]
    path = data.parent / "others.json"
    write_manifest(path, others)
    flags = ["--test_data", path, "--no_speed", "--normalize"]
    code, result, printed, _ = measured(*flags)
    assert code == 0
    assert result["normalized"] == "en"
    assert [row["reference"] for row in result["utterances"][:3]] == [
        "a b", "twenty one c", "in nineteen ninety five twenty first"
    ]  # fmt: skip
    assert "--normalize" not in printed
    (tmp_path / "before.json").write_text(json.dumps(result))
    assert measured(*flags, "--compare", tmp_path / "before.json")[0] == 0
    code, _, _, error = measured(*flags[:3], "--compare", tmp_path / "before.json")
    assert code == 2
    assert "give the same --normalize" in error
    _, result, _, _ = measured(*flags, "de")
    assert result["utterances"][1]["reference"] == "einundzwanzig c"
    code, _, _, error = measured(*flags, "xx")
    assert code == 2
    assert "--normalize xx: no such language" in error
