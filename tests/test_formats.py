"""Results as lines, JSON, subtitles and tables, and where they are written."""

import json
import re

import pytest

from asr.runtime.formats import LINE, LINES, SHOWN, SUFFIXES, cues, format_of, header, render
from asr.runtime.output import Output
from asr.runtime.result import Result, Segment
from asr.runtime.words import Word


def spoken(text, start=0.0, seconds=0.4, pause_after=()):
    """Words of `seconds` each; after those numbered in `pause_after` a segment ends."""
    words, segments, at = [], [], start
    for n, word in enumerate(text.split()):
        words.append(Word(word, at, at + seconds, 0.75))
        at += seconds
        if n in pause_after:
            segments.append(Segment(tuple(words)))
            words, at = [], at + 1.0
    return Result((*segments, Segment(tuple(words))) if words else tuple(segments))


SAID = spoken("turn on the light please", start=3599.5, pause_after=[3])


@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("a.txt", "text"), ("a.SRT", "srt"), ("b/a.vtt", "vtt"), ("a.json", "json"),
        ("a.jsonl", "json"), ("a.tsv", "tsv"), ("a.words", "words"), ("a", "text"),
        ("/dev/stdout", "text"), (None, "text"),
    ],
)  # fmt: skip
def test_the_ending_names_the_format(path, form):
    assert format_of(path) == form


def test_each_format_in_full():
    expected = {
        "text": "turn on the light please\n",
        "srt": "1\n00:59:59,500 --> 01:00:01,100\nturn on the light\n\n"
        "2\n01:00:02,100 --> 01:00:02,500\nplease\n\n",
        "vtt": "WEBVTT\n\n00:59:59.500 --> 01:00:01.100\nturn on the light\n\n"
        "01:00:02.100 --> 01:00:02.500\nplease\n\n",
        "tsv": "start\tend\ttext\n3599500\t3601100\tturn on the light\n3602100\t3602500\tplease\n",
    }
    for form, text in expected.items():
        assert header(form, named=False) + render(SAID, form, "a.wav", named=False) == text
    words = header("words", named=True) + render(SAID, "words", "a.wav", named=True)
    assert words.splitlines()[:2] == [
        "audio_filepath\tstart\tend\tconfidence\tword",
        "a.wav\t3599.50\t3599.90\t0.750\tturn",
    ]
    assert len(words.splitlines()) == 6
    assert render(SAID, "text", "a.wav", named=True) == "a.wav\tturn on the light please\n"


def test_json_is_a_line_with_all_there_is():
    text = render(SAID, "json", "ä.wav", named=False)
    assert text.count("\n") == 1
    entry = json.loads(text)
    assert entry["audio_filepath"] == "ä.wav"
    assert entry["text"] == SAID.text
    assert entry["confidence"] == 0.75
    assert [s["text"] for s in entry["segments"]] == ["turn on the light", "please"]
    first = entry["segments"][0]["words"][0]
    assert first == {"word": "turn", "start": 3599.5, "end": 3599.9, "confidence": 0.75}


@pytest.mark.parametrize("form", SUFFIXES)
def test_silence_has_every_format_too(form):
    text = header(form, named=False) + render(Result(), form, "a.wav", named=False)
    lines = {"text": 1, "json": 1, "srt": 0, "vtt": 2, "tsv": 1, "words": 1}
    assert text.count("\n") == lines[form]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("word " * 60, 0.3), ("word " * 12, 2.5), ("x" * 200 + " y", 0.3), ("slow down", 9.0)],
    ids=["many", "slow", "long", "dragging"],
)
def test_subtitles_are_short_and_lose_no_word(text, seconds):
    result = spoken(text, seconds=seconds)
    assert [w for shown in cues(result) for w in shown] == list(result.words)
    blocks = render(result, "srt", "", named=False).strip().split("\n\n")
    last = 0.0
    for number, block in enumerate(blocks, 1):
        first, times, *lines = block.split("\n")
        assert first == str(number)
        start, end = (
            int(h) * 3600 + int(m) * 60 + float(s.replace(",", "."))
            for h, m, s in re.findall(r"(\d+):(\d+):(\d+,\d+)", times)
        )
        assert last <= start < end <= start + SHOWN + 1e-6
        last = end
        assert all(len(line) <= LINE for line in lines)
        assert len(lines) <= LINES or max(map(len, text.split())) > LINE
    shown = "".join("".join(block.split("\n")[2:]) for block in blocks)
    assert shown.replace(" ", "") == text.replace(" ", "")


def test_signs_of_markup_are_written_as_text_in_vtt():
    assert "a&lt;b&gt;&amp;c" in render(spoken("a<b>&c"), "vtt", "", named=False)


# ---- where they go --------------------------------------------------------------------------


def test_what_was_written_stays_when_the_rest_is_never_done(tmp_path):
    """Each result is on the disk before the next recording is begun."""
    audio, target = [tmp_path / "a.wav", tmp_path / "b.wav"], tmp_path / "new" / "out.txt"
    output = Output(str(target), "text", True, audio)  # neither closed nor finished
    output.write(audio[0], SAID)
    assert target.read_text() == f"{audio[0]}\t{SAID.text}\n"


def test_an_old_file_stays_until_there_is_a_result(tmp_path):
    target = tmp_path / "out.tsv"
    target.write_text("old")
    with Output(str(target), "tsv", True, [tmp_path / "a.wav", tmp_path / "b.wav"]) as output:
        assert target.read_text() == "old"
        output.write(tmp_path / "b.wav", SAID)
    assert target.read_text().startswith("audio_filepath\tstart\tend\ttext\n")


def test_a_folder_takes_a_file_each(tmp_path):
    audio = [tmp_path / "a.wav", tmp_path / "sub" / "b.flac"]
    with Output(f"{tmp_path}/out/", "srt", True, audio) as output:
        for path in audio:
            output.write(path, SAID)
    written = sorted((tmp_path / "out").iterdir())
    assert [p.name for p in written] == ["a.srt", "b.srt"]
    assert written[0].read_text() == render(SAID, "srt", "", named=False)


def test_places_that_cannot_be_are_named_before_anything_is_read(tmp_path):
    audio = [tmp_path / "a.wav", tmp_path / "b.wav"]
    for path in audio:
        path.write_bytes(b"RIFF")
    (tmp_path / "file").write_text("")
    for path, form, message in (
        (None, "srt", "name a folder for several"),
        (str(tmp_path / "all.vtt"), "vtt", "name a folder for several"),
        (str(audio[1]), "text", "is the audio itself"),
        (str(tmp_path / "file" / "x.txt"), "text", "file"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            Output(path, form, True, audio)
    again = [tmp_path / "a.wav", tmp_path / "sub" / "a.flac"]
    with pytest.raises(ValueError, match=r"a\.srt: two recordings have this name"):
        Output(f"{tmp_path}/", "srt", True, again)
