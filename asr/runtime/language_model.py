"""Scores of words from an n-gram model, for the beam search: `scripts/build_lm.py` makes models."""

from __future__ import annotations

import argparse
import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from asr.runtime.arpa import BEGIN, END, UNKNOWN, read_arpa
from asr.runtime.beam import BeamConfig, BeamSearch, WordScorer
from asr.runtime.cli import add_flags, from_flags
from asr.runtime.ngrams import MAGIC, Floats, Ints, Ngrams, State, compile_model, load_ngrams
from asr.runtime.phrases import Grammar, Hotwords, read_phrases

Key = TypeVar("Key")
Value = TypeVar("Value")

LN10 = math.log(10)  # models hold decimal logarithms
AROUND = re.compile(r"^[^\w']+|[^\w']+$")  # what is no letter, digit or apostrophe
THRESHOLDS = ("token_threshold", "beam_threshold")  # of the search; no command offers them
WEIGHTS = ("lm_weight", "word_bonus", "unknown_penalty")  # of a language model
REMEMBERED = 1 << 16  # scores of words in their states, and beginnings of words
LAST = "\U0010ffff"  # the character after all others


class WordModel:
    """A word n-gram model as the scorer of a beam search: see `asr.runtime.beam.WordScorer`.

    A word adds `lm_weight` times its natural log probability and `word_bonus`; one that is not in
    the model also loses `unknown_penalty` for every letter, lest words run together into one
    unknown word. Where the model has a word with other capitals only, or without the punctuation
    around it, the likeliest such is asked; punctuation alone is no word.
    """

    def __init__(self, path: str | Path, config: BeamConfig) -> None:
        """Reads a compiled or an ARPA file; ValueError if that cannot be done."""
        self._model = load_model(path)
        self._config = config
        self._scale = config.lm_weight * LN10
        self._signs = {self._model.find(word) for word in (BEGIN, END, UNKNOWN)}
        scores = self._scale * self._model.unigrams() + config.word_bonus  # (V,)
        self._unknown = float(scores[self._model.unknown])
        scores[list(self._signs)] = -np.inf
        self._folded, order = fold(self._model.words, scores)
        self._order, self._known = order.tolist(), scores[order]
        self._numbers: dict[str, int] = {}
        self._scores: dict[tuple[State, int], tuple[float, State]] = {}
        self._ahead: dict[str, float] = {}

    def start(self) -> State:
        return self._model.start()

    def score(self, state: State, word: str) -> tuple[float, State]:
        number = self._numbers.get(word)
        if number is None:
            number = _remember(self._numbers, word, self._number(word))
        found = self._scores.get((state, number))
        if found is None:
            log, after = self._model.score(state, number)
            score = self._scale * log + self._config.word_bonus
            found = _remember(self._scores, (state, number), (score, after))
        if number != self._model.unknown:
            return found
        if not bare(word):
            return 0.0, state
        return found[0] - self._config.unknown_penalty * len(word), found[1]

    def end(self, state: State) -> float:
        return self._scale * self._model.end(state)

    def ahead(self, prefix: str) -> float:
        """The best score of a word with that beginning, whatever came before it."""
        best = self._ahead.get(prefix)
        if best is None:
            best = _remember(self._ahead, prefix, self._best_word(bare(prefix.lower())))
        return best

    def _best_word(self, prefix: str) -> float:
        """The best score in no context of the words with that beginning, or of an unknown word."""
        first = bisect_left(self._folded, prefix)
        if first < len(self._folded) and self._folded[first].startswith(prefix):
            last = bisect_left(self._folded, prefix + LAST, first)
            best = float(self._known[first:last].max())
            if best > -np.inf:
                return best
        return self._unknown - self._config.unknown_penalty * len(prefix)

    def _number(self, word: str) -> int:
        """The model's word: as it is written, else the likeliest that differs in capitals only.

        Else the same without the punctuation around it.
        """
        number = self._model.find(word)
        if number < 0 and self._folded is not self._model.words:
            word = word.lower()
            at = bisect_left(self._folded, word)
            if at < len(self._folded) and self._folded[at] == word:
                number = self._order[at]
        if number < 0 and (inside := bare(word.lower())) not in ("", word):
            return self._number(inside)
        return self._model.unknown if number < 0 or number in self._signs else number


def bare(word: str) -> str:
    """A word without the punctuation around it; "" for a sign alone."""
    return word if word.isalnum() else AROUND.sub("", word)


def fold(words: list[str], scores: Floats) -> tuple[list[str], Ints]:
    """Words in lower case by the alphabet, the likeliest first of those alike, and their places.

    `words` are by the alphabet; they themselves where none has a capital.
    """
    text = "\n".join(words)
    if text == text.lower():
        return words, np.arange(len(words))
    folded = [word.lower() for word in words]
    order = sorted(range(len(folded)), key=lambda i: (folded[i], -scores[i]))
    return [folded[i] for i in order], np.array(order)


def _remember(table: dict[Key, Value], key: Key, value: Value) -> Value:
    """Puts the value into a table, which is emptied before it grows too large."""
    if len(table) >= REMEMBERED:
        table.clear()
    table[key] = value
    return value


def load_model(path: str | Path) -> Ngrams:
    """An n-gram model from a compiled file or an ARPA file; ValueError, in one line, for others."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such language model; make one with scripts/build_lm.py")
    with open(path, "rb") as file:
        start = file.read(len(MAGIC))
    if start == MAGIC:
        return load_ngrams(path)
    if start.startswith(b"mmap lm"):
        raise ValueError(f"{path}: a binary of kenlm's; name the .arpa file that it was made from")
    model = read_arpa(path)
    try:
        return Ngrams(compile_model(model, exact=True))
    except ValueError as error:
        raise ValueError(f"{path}: not a usable language model: {error}") from None


def load_decoder(tokens: Sequence[str], config: BeamConfig) -> BeamSearch:
    """A beam search over `tokens` with what `config` names; ValueError for what cannot be read."""
    if config.grammar:
        if not Path(config.grammar).is_file():
            raise ValueError(f"{config.grammar}: no such file of phrases")
        everything = replace(config, token_threshold=math.inf, beam_threshold=math.inf)
        return BeamSearch(
            tokens, everything, grammar=Grammar(read_phrases(config.grammar, tokens), tokens)
        )
    scorer: WordScorer | None = WordModel(config.lm, config) if config.lm else None
    if config.hotwords:
        scorer = Hotwords(read_phrases(config.hotwords, tokens), scorer)
    return BeamSearch(tokens, config, scorer)


def add_beam_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that can search with a beam."""
    group = parser.add_argument_group("beam search (with one of these; otherwise greedy)")
    add_flags(group, BeamConfig, skip=THRESHOLDS)


def beam_from_flags(args: argparse.Namespace) -> BeamConfig | None:
    """The search asked for, None for greedy decoding; ValueError for flags that lack `--lm`.

    `--lm none` is none where a command has a model of its own.
    """
    if args.lm == "none":
        args.lm = None
    for name in WEIGHTS:
        if args.lm is None and getattr(args, name) is not None:
            raise ValueError(f"--{name} needs a language model: --lm FILE")
    config: BeamConfig = from_flags(BeamConfig, args)
    return None if config == BeamConfig() and args.beam_size is None else config
