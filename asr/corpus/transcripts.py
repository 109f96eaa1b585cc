"""Transcripts without their audio, and what two sets of them have in common.

A set is a manifest, a LibriSpeech folder, a folder of either (see `manifest.find_sources`), a
LibriSpeech transcript file (`*.trans.txt`, lines of an id and a text), or plain text, a sentence a
line.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from asr.corpus.librispeech import scan_librispeech
from asr.corpus.manifest import SUFFIXES, normalise, read_manifest
from asr.corpus.splits import find_sources

KEPT = "'\u200c\u200d"  # apostrophes; joiners, which Persian and Indian words are spelled with
EXAMPLES = 20  # overlaps that are named, of each kind


class Line(NamedTuple):
    """A transcript; `id` and `speaker` are '' where they are not known."""

    id: str
    speaker: str
    text: str


def read_lines(path: str | Path) -> list[Line]:
    """All transcripts at `path`, normalised; ValueError for what cannot be read."""
    return list(iterate_lines(path))


def iterate_lines(path: str | Path) -> Iterator[Line]:
    """The same one by one: a text may be larger than the memory."""
    path = Path(path)
    if path.is_file() and path.suffix.lower() not in SUFFIXES:
        sources = iter([_read_text(path)])
    else:
        sources = (_read_source(source) for source in find_sources(path).values())
    empty = True
    for line in itertools.chain.from_iterable(sources):
        empty = False
        yield line
    if empty:
        raise ValueError(f"{path}: no text in it")


def words_of(text: str) -> list[str]:
    """The words of a normalised text: what stands between spaces and punctuation.

    Apostrophes belong to words, and so do vowel signs and other marks that combine with letters;
    digits stay, although a model of letters can never write them.
    """
    return text.translate(_IN_WORDS).split()


class _InWords(dict[int, str]):
    """What becomes of each character in a word, for str.translate; filled as characters come."""

    def __missing__(self, code: int) -> str:
        character, category = chr(code), unicodedata.category(chr(code))
        if character.isalnum() or category.startswith("M") or character in KEPT:
            self[code] = character
        elif category == "Cf" and character != "\u200b":  # a mark that nobody sees or hears
            self[code] = ""
        else:
            self[code] = " "
        return self[code]


_IN_WORDS = _InWords()


def without(lines: Iterable[Line], others: Iterable[Line]) -> list[Line]:
    """The lines whose words are not those of one of the others."""
    closed = {tuple(words_of(line.text)) for line in others}
    return [line for line in lines if tuple(words_of(line.text)) not in closed]


def overlap(train: Sequence[Line], test: Sequence[Line]) -> dict[str, Any]:
    """How many utterances, speakers and sentences of `test` also stand in `train`; JSON types.

    Utterances are told by their ids, sentences by their words; sentences of one word are counted
    apart, since any two speakers say "yes". Of each kind some are named.
    """
    texts = [(line, " ".join(words_of(line.text))) for line in test]
    known = {" ".join(words_of(line.text)) for line in train}
    both = [(line, text) for line, text in texts if text in known]
    ids = {line.id for line in train} & {line.id for line in test} - {""}
    speakers = {line.speaker for line in train} & {line.speaker for line in test} - {""}
    longer = [f"{line.id}: {text}" for line, text in both if " " in text]
    return {
        "utterances": len(test),
        "shared_utterances": len(ids),
        "speakers": len({line.speaker for line in test} - {""}),
        "shared_speakers": len(speakers),
        "shared_sentences": len(longer),
        "shared_single_words": len(both) - len(longer),
        "examples": {
            "utterances": sorted(ids)[:EXAMPLES],
            "speakers": sorted(speakers)[:EXAMPLES],
            "sentences": longer[:EXAMPLES],
        },
    }


def _read_text(path: Path) -> Iterator[Line]:
    with_ids = path.name.endswith(".trans.txt")
    with open(path, encoding="utf-8-sig") as file:
        try:
            for line in file:
                if line.strip():
                    id, _, words = line.strip().partition(" ") if with_ids else ("", "", line)
                    yield Line(id, _speaker(id), normalise(words))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None


def _read_source(path: Path) -> Iterator[Line]:
    if path.is_dir():
        for id, speaker, _, text in scan_librispeech(path):
            if text is not None:
                yield Line(id, speaker, text)
    else:
        for u in read_manifest(path):
            yield Line(u.id, u.speaker, u.text)


def _speaker(id: str) -> str:
    """The first number of a LibriSpeech id SPEAKER-CHAPTER-NUMBER."""
    return id.partition("-")[0] if re.fullmatch(r"\d+-\d+-\d+", id) else ""
