"""Manifests, LibriSpeech trees and which data training may see."""

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr.corpus.librispeech import read_librispeech
from asr.corpus.manifest import ManifestError, Utterance, normalise, read_manifest, write_manifest
from asr.corpus.splits import find_sources, hold_out, load_dataset, load_splits

CORPORA = Path(os.environ.get("ASR_CORPORA", Path(__file__).parents[1] / ".." / "shared"))


def line(audio="a.wav", duration=1.0, text="hello", **more):
    return json.dumps({"audio_filepath": audio, "duration": duration, "text": text, **more}) + "\n"


def write_split(folder, speakers, format="flac", count=2, chapter="1"):
    """A LibriSpeech split folder with `count` utterances of a tenth of a second a speaker."""
    for speaker in speakers:
        place = folder / speaker / chapter
        place.mkdir(parents=True)
        ids = [f"{speaker}-{chapter}-{i:04}" for i in range(count)]
        for id in ids:
            soundfile.write(place / f"{id}.{format}", np.zeros(1600), 16000)
        text = "".join(f"{id} HELLO  WORLD\n" for id in ids)
        (place / f"{speaker}-{chapter}.trans.txt").write_text(text)


def test_normalise():
    assert normalise("  DON\u2019T\tPanic\u00a0\u2018Now\n") == "don't panic 'now"
    assert normalise("\ufb01ne e\u0301") == "fine \u00e9"


def test_round_trip(tmp_path):
    (tmp_path / "wav").mkdir()
    inside = str(tmp_path / "wav" / "x.wav")
    utterances = [
        Utterance(inside, 1.25, "hello world", "7"),
        Utterance("/elsewhere/y.wav", 2.0, "ça va", id="other"),
    ]
    path = tmp_path / "new" / "train.json"
    write_manifest(path, utterances, relative_to=tmp_path)
    assert json.loads(path.read_text().splitlines()[0])["audio_filepath"] == "wav/x.wav"
    assert not stat.S_IMODE(path.stat().st_mode) & 0o111
    write_manifest(tmp_path / "train.json", utterances, relative_to=tmp_path)
    assert read_manifest(tmp_path / "train.json") == utterances
    assert utterances[0].id == "x"


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "train.json"
    write_manifest(path, [Utterance("/a.wav", 1.0, "old")])
    before = path.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_manifest(path, [Utterance("/a.wav", 1.0, "new")])
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["train.json"]


def test_paths(tmp_path, monkeypatch):
    beside, here = tmp_path / "data", tmp_path / "work"
    beside.mkdir()
    here.mkdir()
    (here / "only_here.wav").touch()
    (here / "both.wav").touch()
    (beside / "both.wav").touch()
    names = ["only_here.wav", "both.wav", "nowhere.wav", "/absolute.wav", "../work/both.wav"]
    (beside / "m.json").write_text("".join(line(name) for name in names))
    monkeypatch.chdir(here)
    expected = [here / "only_here.wav", beside / "both.wav", beside / "nowhere.wav"]
    expected += [Path("/absolute.wav"), here / "both.wav"]
    found = [u.audio_filepath for u in read_manifest("../data/m.json")]
    assert found == [str(path) for path in expected]


def test_tolerates_blank_lines_bom_and_extra_keys(tmp_path):
    text = "\ufeff" + line(speaker=12, lang="en", offset=0) + "\n\r\n" + line("b.wav", speaker=None)
    (tmp_path / "m.json").write_text(text, encoding="utf-8")
    assert [u.speaker for u in read_manifest(tmp_path / "m.json")] == ["12", ""]


BROKEN = {
    '{"audio_filepath": "a.wav", "durat': "not a JSON object",
    "[1, 2]": "one JSON object a line, not a list",
    '{"audio_filepath": "a.wav", "text": "x"}': "duration missing",
    '{"duration": 1}': "audio_filepath, text missing",
    line(audio=3): "must be strings",
    line(text=["x"]): "must be strings",
    line(duration="1.0"): "expected seconds",
    line(duration=float("nan")): "expected seconds",
    line(duration=-1): "expected seconds",
    line(duration=True): "expected seconds",
    line(offset=3.5): "offset is not supported",
    "[" * 100_000: "not a JSON object",
}


@pytest.mark.parametrize("text", BROKEN, ids=BROKEN.values())
def test_broken_lines_are_named(tmp_path, text):
    (tmp_path / "m.json").write_text(line() + "\n" + text)
    with pytest.raises(ManifestError, match=rf"m\.json, line 3: .*{BROKEN[text]}") as info:
        read_manifest(tmp_path / "m.json")
    assert "\n" not in str(info.value)


def test_not_utf8(tmp_path):
    (tmp_path / "m.json").write_bytes(line().encode() + b'{"text": "\xff"}\n')
    with pytest.raises(ManifestError, match="line 2: not UTF-8"):
        read_manifest(tmp_path / "m.json")


def test_no_manifest(tmp_path):
    (tmp_path / "empty.json").touch()
    with pytest.raises(ManifestError, match="no utterances"):
        read_manifest(tmp_path / "empty.json")
    with pytest.raises(ManifestError, match="no such manifest"):
        read_manifest(tmp_path / "none.json")


@pytest.mark.parametrize("format", ["flac", "wav", "ogg", "mp3"])
def test_librispeech(tmp_path, format):
    write_split(tmp_path / "dev-clean", ["20", "3"], format)
    (tmp_path / "dev-clean" / "3" / "1" / ".hidden.flac").touch()
    utterances = read_librispeech(tmp_path / "dev-clean")
    assert [u.id for u in utterances] == ["20-1-0000", "20-1-0001", "3-1-0000", "3-1-0001"]
    assert [u.speaker for u in utterances] == ["20", "20", "3", "3"]
    assert {u.text for u in utterances} == {"hello world"}
    assert {u.duration for u in utterances} == {0.1}
    assert Path(utterances[0].audio_filepath).is_absolute()


def test_librispeech_with_gaps(tmp_path):
    write_split(tmp_path / "dev", ["1"])
    (tmp_path / "dev" / "1" / "1" / "1-1-0000.flac").unlink()
    with pytest.raises(ManifestError, match=r"1 utterances lack audio .*1-1-0000.*prepare_data"):
        read_librispeech(tmp_path / "dev")
    with pytest.raises(ManifestError, match="check the path"):
        read_librispeech(tmp_path)


def test_splits_of_a_tree(tmp_path):
    write_split(tmp_path / "train-clean-100", ["1", "2"])
    write_split(tmp_path / "train-other", ["3"], "wav")
    write_split(tmp_path / "dev-clean", ["4"])
    write_split(tmp_path / "extra", ["6"])
    write_split(tmp_path / "test-clean", ["5"])
    for file in (tmp_path / "test-clean").rglob("*.flac"):
        file.write_bytes(b"reading this would fail")
    splits = load_splits(tmp_path)
    assert {u.speaker for u in splits.train} == {"1", "2", "3"}
    assert {u.speaker for u in splits.dev} == {"4"}
    assert splits.notes == ["not used: extra (neither train*, dev* nor test*)"]


def test_splits_of_manifests(tmp_path):
    (tmp_path / "train-a.json").write_text(line("a.wav", speaker="1"))
    (tmp_path / "train-b.jsonl").write_text(line("b.wav", speaker="2"))
    (tmp_path / "dev.json").write_text(line("c.wav"))
    (tmp_path / "test.json").write_text("broken: never opened")
    splits = load_splits(tmp_path)
    assert [u.id for u in splits.train] == ["a", "b"]
    assert [u.id for u in splits.dev] == ["c"]
    assert [u.id for u in load_dataset(tmp_path, only="train")] == ["a", "b"]
    with pytest.raises(ManifestError, match="line 1"):
        load_dataset(tmp_path)
    with pytest.raises(ManifestError, match="no split named x"):
        load_dataset(tmp_path, only="x")


def manifest_of(speakers, per_speaker=3):
    return "".join(line(f"{s}-{i}.wav", speaker=s) for s in speakers for i in range(per_speaker))


def test_speakers_are_held_out(tmp_path):
    path = tmp_path / "mine.json"  # a split given alone trains whatever its name
    path.write_text(manifest_of([f"s{i}" for i in range(40)]))
    splits = load_splits(path)
    assert len({u.speaker for u in splits.dev}) == 2  # 5 % of 40
    assert not {u.speaker for u in splits.dev} & {u.speaker for u in splits.train}
    assert len(splits.train) + len(splits.dev) == 120
    assert "held out 2 of 40 speakers" in splits.notes[0]
    assert load_splits(path) == splits
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(reversed(lines)))  # the order of the lines does not matter
    assert {u.speaker for u in load_splits(path).dev} == {u.speaker for u in splits.dev}
    others = [{u.speaker for u in load_splits(path, seed=seed).dev} for seed in range(5)]
    assert len({frozenset(x) for x in others}) > 1
    assert len({u.speaker for u in load_splits(path, dev_share=0.5).dev}) == 20


@pytest.mark.parametrize("speaker", ["", "only one"])
def test_recordings_are_held_out(speaker):
    utterances = [Utterance(f"/{i // 2}.wav", 1.0, "x", speaker, str(i)) for i in range(80)]
    train, dev, note = hold_out(utterances)
    assert len(dev) == 4  # two recordings, each with two lines
    assert not {u.audio_filepath for u in dev} & {u.audio_filepath for u in train}
    assert "2 of 40 recordings" in note
    assert "speakers unknown" in note


def test_one_person_may_be_in_both(tmp_path):
    for name, words in (("train", "abc"), ("dev", "xyz")):
        own = {"duration": 1, "speaker": "me"}
        lines = (json.dumps({"audio_filepath": f"{w}.wav", "text": w} | own) for w in words)
        (tmp_path / f"{name}.json").write_text("\n".join(lines))
    splits = load_splits(tmp_path)
    assert (len(splits.train), len(splits.dev)) == (3, 3)
    assert "me alone speaks" in splits.notes[0]
    other = {"audio_filepath": "o.wav", "duration": 1, "text": "o", "speaker": "other"}
    with open(tmp_path / "train.json", "a") as file:
        file.write("\n" + json.dumps(other))
    with pytest.raises(ManifestError, match="both in train"):
        load_splits(tmp_path)


def test_at_least_one_is_held_out():
    train, dev, _ = hold_out([Utterance("/a.wav", 1, "x", "1"), Utterance("/b.wav", 1, "x", "2")])
    assert (len(train), len(dev)) == (1, 1)
    with pytest.raises(ManifestError, match="cannot be split"):
        hold_out(train)


def test_overlap_is_an_error(tmp_path):
    (tmp_path / "train.json").write_text(line("a.wav", speaker="1") + line("b.wav", speaker="2"))
    dev = tmp_path / "dev.json"
    dev.write_text(line("b.wav", text="another", speaker="9"))  # the same file
    with pytest.raises(ManifestError, match=r"1 utterances .* in train\* and in dev\* \(b\)"):
        load_splits(tmp_path)
    for speaker in ("", "2"):
        dev.write_text(line("copies/b.wav", duration=1.004, speaker=speaker))  # a copy of it
        with pytest.raises(ManifestError, match="1 utterances"):
            load_splits(tmp_path)
    dev.write_text(line("copies/b.wav", speaker="9"))  # somebody else's
    assert len(load_splits(tmp_path).dev) == 1
    dev.write_text(line("copies/b.wav", text="not the same", speaker="9"))
    assert len(load_splits(tmp_path).dev) == 1
    dev.write_text(line("c.wav", speaker="2"))
    with pytest.raises(ManifestError, match=r"1 speakers .*\(2\)"):
        load_splits(tmp_path)


def test_linked_copies_are_an_overlap(tmp_path):
    (tmp_path / "a.wav").touch()
    (tmp_path / "b.wav").symlink_to("a.wav")
    (tmp_path / "train.json").write_text(line("a.wav"))
    (tmp_path / "dev.json").write_text(line("b.wav", text="other"))
    with pytest.raises(ManifestError, match="1 utterances"):
        load_splits(tmp_path)


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(ManifestError, match="no such file or folder"):
        load_splits(tmp_path / "none")
    with pytest.raises(ManifestError, match="neither manifests"):
        load_splits(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ManifestError, match="not a manifest"):
        load_splits(tmp_path / "notes.txt")
    (tmp_path / "dev.json").write_text(line())
    with pytest.raises(ManifestError, match=r"no split named train\* \(found dev\)"):
        load_splits(tmp_path)
    (tmp_path / "test.json").write_text(line())
    for name in ("dev.json", "test.json"):
        with pytest.raises(ManifestError, match=r"no split named train\*"):
            load_splits(tmp_path / name)
    (tmp_path / "train.json").touch()
    with pytest.raises(ManifestError, match="no utterances"):
        load_splits(tmp_path)


def test_find_sources_names_a_single_folder(tmp_path, monkeypatch):
    write_split(tmp_path / "train-x", ["1"])
    monkeypatch.chdir(tmp_path / "train-x")
    assert list(find_sources(".")) == ["train-x"]
    assert len(load_dataset(".")) == 2
    assert len(load_dataset("..")) == 2


@pytest.mark.skipif(not (CORPORA / "LibriSpeech").is_dir(), reason="no real speech: ASR_CORPORA")
def test_real_speech():
    dev = load_dataset(CORPORA / "LibriSpeech" / "dev-clean")
    assert len(dev) > 100
    assert all(u.id.startswith(f"{u.speaker}-") for u in dev)
    assert set("".join(u.text for u in dev)) <= set("abcdefghijklmnopqrstuvwxyz' ")
    seconds = [u.duration for u in dev[:5]]
    assert seconds == [soundfile.info(u.audio_filepath).duration for u in dev[:5]]
