"""Scores of words from an n-gram model, read by the `kenlm` package (Heafield 2011).

kenlm is an optional extra: it is imported only where a model is loaded. `scripts/build_lm.py`
makes a model from text.
"""

from __future__ import annotations

import argparse
import gzip
import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from asr.runtime.beam import BeamConfig, BeamSearch
from asr.runtime.cli import add_flags, from_flags

LN10 = math.log(10)  # models hold decimal logarithms
THRESHOLDS = ("token_threshold", "beam_threshold")  # of the search; no command offers them


class WordModel:
    """A word n-gram model as the scorer of a beam search: see `asr.runtime.beam.WordScorer`.

    A word adds `lm_weight` times its natural log probability and `word_bonus`; one that is not in
    the model also loses `unknown_penalty` for every letter, lest words run together into one
    unknown word. A model of capital letters is asked in capitals.
    """

    def __init__(self, path: str | Path, config: BeamConfig) -> None:
        """Reads an .arpa, .arpa.gz or kenlm binary file; ValueError if that cannot be done."""
        self._model, self._kenlm = load_kenlm(path)
        self._config = config
        self._capitals = "the" not in self._model and "THE" in self._model
        self._scale = config.lm_weight * LN10
        self._null = self._kenlm.State()
        self._model.NullContextWrite(self._null)
        self._best = self._best_by_prefix(path)

    def start(self) -> Any:
        state = self._kenlm.State()
        self._model.BeginSentenceWrite(state)
        return state

    def score(self, state: Any, word: str) -> tuple[float, Any]:
        after = self._kenlm.State()
        if self._capitals:
            word = word.upper()
        score = self._scale * self._model.BaseScore(state, word, after) + self._config.word_bonus
        if word not in self._model:
            score -= self._config.unknown_penalty * len(word)
        return score, after

    def end(self, state: Any) -> float:
        return self._scale * float(self._model.BaseScore(state, "</s>", self._kenlm.State()))

    def ahead(self, prefix: str) -> float:
        """The best score of a word with that beginning, whatever came before it."""
        best = self._best.get(prefix)
        return self.score(self._null, prefix)[0] if best is None else best

    def _best_by_prefix(self, path: str | Path) -> dict[str, float]:
        """The best score in no context of the words with each beginning."""
        best: dict[str, float] = {}
        for word in read_vocabulary(path):
            if word in ("<unk>", "<s>", "</s>"):
                continue
            if self._capitals:
                word = word.lower()
            score = self.score(self._null, word)[0]
            for end in range(1, len(word) + 1):
                if best.get(word[:end], -math.inf) < score:
                    best[word[:end]] = score
        if not best:
            raise ValueError(f"{path}: lists no words; use the .arpa file, or build_binary anew")
        return best


def load_kenlm(path: str | Path) -> tuple[Any, Any]:
    """A kenlm model and the kenlm module; ValueError, in one line, for what is missing."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such language model; make one with scripts/build_lm.py")
    try:
        import kenlm
    except ImportError:
        raise ValueError("a language model needs the kenlm package: pip install kenlm") from None
    try:
        config = kenlm.Config()
        config.show_progress = False
        config.arpa_complain = kenlm.ARPALoadComplain.NONE
        return kenlm.Model(str(path), config), kenlm
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[-160:]
        raise ValueError(f"{path}: not a language model that kenlm can read ({reason})") from None


def read_vocabulary(path: str | Path) -> Iterator[str]:
    """The words of an ARPA file, packed or not, or of a kenlm binary that lists them.

    ValueError for an ARPA file that is not UTF-8.
    """
    with open(path, "rb") as file:
        start = file.read(7)
        if start == b"mmap lm":  # how a kenlm binary begins; the words end it
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                at = data.rfind(b"<unk>\0")
                words = data[at:].decode("utf-8", "replace") if at >= 0 else ""
            yield from words.rstrip("\0").split("\0")
            return
    opener: Any = gzip.open if start.startswith(b"\x1f\x8b") else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("\\1-grams:"):
                    break
            for line in lines:
                if not line.strip():
                    break
                yield line.split("\t")[1].strip()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; convert it, for example with iconv") from None


def load_decoder(tokens: Sequence[str], config: BeamConfig) -> BeamSearch:
    """A beam search over `tokens` with the language model that `config` names, if any."""
    return BeamSearch(tokens, config, WordModel(config.lm, config) if config.lm else None)


def add_beam_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that can search with a beam."""
    group = parser.add_argument_group("beam search (with --lm or --beam_size; otherwise greedy)")
    add_flags(group, BeamConfig, skip=THRESHOLDS)


def beam_from_flags(args: argparse.Namespace) -> BeamConfig | None:
    """The search asked for, None for greedy decoding; ValueError for flags that lack `--lm`."""
    if args.lm is None:
        for f in fields(BeamConfig):
            if f.name not in (*THRESHOLDS, "lm", "beam_size") and getattr(args, f.name) is not None:
                raise ValueError(f"--{f.name} needs a language model: --lm FILE")
        if args.beam_size is None:
            return None
    config: BeamConfig = from_flags(BeamConfig, args)
    return config
