"""Results as text: lines, JSON, subtitles (SubRip, WebVTT), tables of segments or of words."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from asr.runtime.result import Result, Segment
from asr.runtime.words import Word

if TYPE_CHECKING:
    from asr.runtime.live import Event

SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt", "tsv": ".tsv",
            "words": ".words"}  # fmt: skip
SUBTITLES = ("srt", "vtt")  # a file of these holds one recording
LINE, LINES = 42, 2  # characters of a subtitle's line; lines
SHOWN = 7.0  # seconds of a subtitle


def format_of(path: str | Path | None) -> str:
    """The format that a file's ending names; text for others and for none."""
    suffix = Path(path).suffix.lower() if path else ""
    endings = {ending: name for name, ending in SUFFIXES.items()} | {".jsonl": "json"}
    return endings.get(suffix, "text")


def header(form: str, named: bool) -> str:
    """What stands once before the results in a file, `named` where recordings are told apart."""
    if form == "vtt":
        return "WEBVTT\n\n"
    columns = {"tsv": ["start", "end", "text"], "words": ["start", "end", "confidence", "word"]}
    if form not in columns:
        return ""
    return "\t".join(["audio_filepath"] * named + columns[form]) + "\n"


def render(result: Result, form: str, path: str, named: bool) -> str:
    """A recording's result in a format; `path` is written in JSON and where `named`.

    Seconds everywhere but in tsv, which has whole milliseconds like Whisper's.
    """
    if form == "json":
        return line({"audio_filepath": path} | as_dict(result)) + "\n"
    if form in SUBTITLES:
        return "".join(subtitles(result, form))
    rows: list[list[Any]] = [[result.text]]
    if form == "tsv":
        rows = [[round(1000 * s.start), round(1000 * s.end), s.text] for s in result.segments]
    elif form == "words":
        rows = [
            [f"{w.start:.2f}", f"{w.end:.2f}", f"{w.confidence:.3f}", w.text] for w in result.words
        ]
    return "".join("\t".join(map(str, [path] * named + row)) + "\n" for row in rows)


def as_dict(result: Result) -> dict[str, Any]:
    """A result in JSON types, seconds in hundredths."""
    return {
        "text": result.text,
        "confidence": round(result.confidence, 3),
        "segments": [segment_as_dict(segment) for segment in result.segments],
    }


def segment_as_dict(segment: Segment) -> dict[str, Any]:
    """A segment with its words in JSON types."""
    return {
        "start": round(segment.start, 2), "end": round(segment.end, 2), "text": segment.text,
        "confidence": round(segment.confidence, 3),
        "words": [
            {"word": w.text, "start": round(w.start, 2), "end": round(w.end, 2),
             "confidence": round(w.confidence, 3)}
            for w in segment.words
        ],
    }  # fmt: skip


def render_event(event: Event, form: str, terminal: bool) -> str:
    """What is known of live speech: in JSON every event, else lines of final text.

    On a terminal the last line is written over until it is final.
    """
    if form == "json":
        return line({"final": event.final} | segment_as_dict(event.segment)) + "\n"
    if not terminal:
        return event.segment.text + "\n" if event.final else ""
    again, text = "\r\033[K", event.segment.text
    return f"{again}{text}\n" if event.final else again + text[1 - get_terminal_size().columns :]


def line(entry: dict[str, Any]) -> str:
    """An object in one line of JSON."""
    return json.dumps(entry, ensure_ascii=False)


def subtitles(result: Result, form: str) -> Iterator[str]:
    """The blocks of an .srt or .vtt file: at most `LINES` lines of `LINE` characters, `SHOWN` s."""
    for number, words in enumerate(cues(result), 1):
        start, end = words[0].start, min(words[-1].end, words[0].start + SHOWN)
        text = "\n".join(wrap(" ".join(w.text for w in words), LINE))
        if form == "vtt":
            times = f"{clock(start, '.')} --> {clock(end, '.')}"
            yield f"{times}\n{html.escape(text, quote=False)}\n\n"
        else:
            yield f"{number}\n{clock(start, ',')} --> {clock(end, ',')}\n{text}\n\n"


def cues(result: Result) -> Iterator[list[Word]]:
    """The words that are shown together: of one segment, as many as there are room and time for."""
    for segment in result.segments:
        shown: list[Word] = []
        for word in segment.words:
            text = " ".join(w.text for w in [*shown, word])
            late = shown and word.end - shown[0].start > SHOWN
            if shown and (late or len(wrap(text, LINE)) > LINES):
                yield shown
                shown = []
            shown.append(word)
        yield shown


def clock(seconds: float, point: str) -> str:
    """Hours, minutes, seconds and milliseconds as subtitles have them."""
    minutes, thousandths = divmod(round(1000 * seconds), 60_000)
    return (
        f"{minutes // 60:02}:{minutes % 60:02}:{thousandths // 1000:02}{point}"
        f"{thousandths % 1000:03}"
    )
