"""Pronunciations of words: a line `word<TAB>phonemes`, these with spaces between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

Pronunciations = dict[str, tuple[str, ...]]  # of each word the phonemes

# What a recogniser of several languages may hear in English, as the English phoneme; and signs of
# details that no word hangs on.
ENGLISH = {
    "ɡ": "g", "d̪": "d", "t̪": "t", "ɾ": "t", "ɣ": "g", "a": "ɑ", "r": "ɹ", "e": "eɪ", "o": "oʊ",
    "ĩ": "i", "õ": "oʊ", "b̪": "b", "β": "b", "x": "h", "y": "j",
}  # fmt: skip
DETAILS = "̪̞̟͈"


def read_lexicon(path: str | Path) -> Pronunciations:
    """The first pronunciation of every word; ValueError, naming the line, for another file."""
    found: Pronunciations = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such lexicon; scripts/pronounce.py writes one") from None
    for number, line in enumerate(lines, 1):
        word, tab, spoken = line.partition("\t")
        if not tab:
            raise ValueError(f"{path}, line {number}: {line!r} is not a word, a tab and phonemes")
        phones = [ENGLISH.get(x, x) for x in spoken.split() if x not in DETAILS]
        if phones:
            found.setdefault(word, tuple(phones))
    return found


def phonemes(lexicon: Pronunciations, known: Sequence[str]) -> list[str]:
    """The `known` phonemes of the lexicon; a rare one is a mistake of its maker."""
    counts = Counter(phone for spoken in lexicon.values() for phone in spoken)
    least = max(2, len(lexicon) // 3000)
    return sorted(phone for phone in set(known) & counts.keys() if counts[phone] >= least)
