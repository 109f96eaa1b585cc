"""Phrases to listen for: hotwords, which the search prefers, and grammars, which are all there is.

Both are scorers of a beam search, see `asr.runtime.beam.WordScorer`, and need no language model.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from asr.runtime.tokenizer import SPACE, name_character

if TYPE_CHECKING:
    from asr.runtime.beam import WordScorer

HOTWORD_BONUS = 10.0  # natural logarithm, for every word of a phrase

Phrase = tuple[str, ...]


class Hotwords:
    """Adds a bonus for every word of a phrase that is said whole, to another scorer or to none.

    What a phrase has got so far is lent: it is taken back where the text goes on otherwise (as in
    k2's context graphs). A beginning of a word is promised its part, for pruning. Capitals, and
    punctuation around a word, make no difference.
    """

    def __init__(self, phrases: dict[Phrase, float], scorer: WordScorer | None = None) -> None:
        """`phrases` with the bonus that each of their words brings."""
        self._scorer = scorer
        phrases = {tuple(map(bare, phrase)): bonus for phrase, bonus in phrases.items()}
        self._whole = {phrase: bonus * len(phrase) for phrase, bonus in phrases.items()}
        self._lent: dict[Phrase, float] = {(): 0.0}  # for the beginnings of phrases
        self._promised: dict[str, float] = {}  # for the beginnings of words
        for phrase, bonus in phrases.items():
            for n in range(1, len(phrase)):
                self._lent[phrase[:n]] = max(self._lent.get(phrase[:n], 0.0), bonus * n)
            for word in phrase:
                for n in range(1, len(word) + 1):
                    promised = max(self._promised.get(word[:n], 0.0), bonus * n / len(word))
                    self._promised[word[:n]] = promised

    def start(self) -> Any:
        return (), self._scorer.start() if self._scorer else None

    def score(self, state: Any, word: str) -> tuple[float, Any]:
        begun, inner = state
        score, inner = self._scorer.score(inner, word) if self._scorer else (0.0, None)
        if not (word := bare(word)):  # a sign that stands alone
            return score, (begun, inner)
        text = (*begun, word)
        ends = [text[i:] for i in range(len(text) + 1)]  # the longest first, () last
        after = next(end for end in ends if end in self._lent)
        said = next((self._whole[end] for end in ends if end in self._whole), 0.0)
        return score + said + self._lent[after] - self._lent[begun], (after, inner)

    def end(self, state: Any) -> float:
        begun, inner = state
        return (self._scorer.end(inner) if self._scorer else 0.0) - self._lent[begun]

    def ahead(self, prefix: str) -> float:
        other = self._scorer.ahead(prefix) if self._scorer else 0.0
        return other + self._promised.get(bare(prefix), 0.0)


def bare(word: str) -> str:
    """A word in lower case without the punctuation around it; "" for a sign alone."""
    low = word.lower()
    if low.isalpha():
        return low
    return low.strip("".join(c for c in low if c != "'" and unicodedata.category(c)[0] in "PS"))


class Grammar:
    """Lets only listed phrases pass, one after another, or nothing at all.

    A state is the set of the beginnings of phrases in which the words before can end.
    """

    def __init__(self, phrases: Iterable[Phrase], tokens: Sequence[str]) -> None:
        self._phrases = set(phrases)
        self._next: dict[Phrase, set[str]] = {}  # the words after each beginning of a phrase
        for phrase in self._phrases:
            for n, word in enumerate(phrase):
                self._next.setdefault(phrase[:n], set()).add(word)
        self._tokens = tokens
        self._allowed: dict[tuple[Any, str], npt.NDArray[np.bool_]] = {}

    def start(self) -> Any:
        return frozenset([()])

    def score(self, state: Any, word: str) -> tuple[float, Any]:
        after = frozenset(
            (*begun, word) for begun in self._places(state) if word in self._next.get(begun, ())
        )
        return (0.0 if after else -math.inf), after

    def end(self, state: Any) -> float:
        return 0.0 if () in self._places(state) else -math.inf

    def ahead(self, prefix: str) -> float:
        return 0.0

    def allowed(self, state: Any, word: str) -> npt.NDArray[np.bool_]:
        """Which tokens (V,) may follow an unfinished word, or none."""
        found = self._allowed.get((state, word))
        if found is None:
            within = self._beginnings(state)
            after = self._beginnings(self.score(state, word)[1]) if word else within
            found = self._allowed[state, word] = np.array([
                token[1:] in after if token.startswith(SPACE) else word + token in within
                for token in self._tokens
            ])  # fmt: skip
        return found

    def _places(self, state: Any) -> set[Phrase]:
        """The beginnings of phrases, with that of a new one where one has ended."""
        return set(state) | ({()} if any(begun in self._phrases for begun in state) else set())

    def _beginnings(self, state: Any) -> set[str]:
        """The beginnings of the words that may come next, "" too if there are any."""
        words = set().union(*(self._next.get(begun, ()) for begun in self._places(state)))
        return {word[:n] for word in words for n in range(len(word) + 1)}


def read_phrases(text: str, tokens: Sequence[str]) -> dict[Phrase, float]:
    """Phrases and their bonuses from "raspberry pi, conformer:6" or from a file with one a line.

    In a file, what follows a # is passed over. ValueError for what the tokens cannot write.
    """
    letters = set("".join(tokens[1:])) - {SPACE}
    is_file = os.path.isfile(text)  # also false for what is too long for a name
    if is_file:
        try:
            lines = Path(text).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ValueError(
                f"{text}: not UTF-8 text; convert it, for example with iconv"
            ) from None
        entries = [line.partition("#")[0] for line in lines]
    elif text.endswith(".txt") or (os.sep in text and os.sep not in letters):
        raise ValueError(f"{text}: no such file of phrases")
    else:
        entries = text.split(",")
    where = f"{text}: " if is_file else ""
    found = {}
    for entry in filter(str.strip, entries):
        phrase, colon, number = entry.rpartition(":")
        bonus = _number(number) if colon else None
        words = (entry if bonus is None else phrase).split()
        found[tuple(_written(word, letters, where) for word in words)] = (
            HOTWORD_BONUS if bonus is None else bonus
        )
    if not found or () in found:
        raise ValueError(f"{where or repr(text)}: no phrases in it")
    return found


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _written(word: str, letters: set[str], where: str) -> str:
    """The word as the model writes it."""
    word = unicodedata.normalize("NFKC", word)
    for form in (word, word.lower(), word.upper()):
        if set(form) <= letters:
            return form
    unknown = ", ".join(map(name_character, sorted(set(word.lower()) - letters)))
    raise ValueError(f"{where}{word!r}: the model cannot write {unknown}; spell it otherwise")
