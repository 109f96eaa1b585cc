"""Word and character error rate over a corpus, counted by jiwer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, Any]:
    """Corpus `wer` and `cer` with counts of substitutions, insertions and deletions.

    Rates are errors over reference words (characters, spaces counted); an empty reference counts
    its hypothesis as insertions. Raises ValueError if there is no reference word at all.
    """
    words = [word_counts(r, h) for r, h in zip(references, hypotheses, strict=True)]
    chars = [character_counts(r, h) for r, h in zip(references, hypotheses, strict=True)]
    totals, char_totals = np.sum(words, axis=0), np.sum(chars, axis=0)
    if len(references) == 0 or totals[3] == 0:
        raise ValueError("no reference words: nothing to measure against")
    return {
        "wer": float(totals[:3].sum() / totals[3]),
        "cer": float(char_totals[:3].sum() / char_totals[3]),
        "substitutions": int(totals[0]),
        "insertions": int(totals[1]),
        "deletions": int(totals[2]),
        "words": int(totals[3]),
        "characters": int(char_totals[3]),
    }


def word_counts(reference: str, hypothesis: str) -> tuple[int, int, int, int]:
    """Substitutions, insertions, deletions and reference words of one utterance."""
    if not reference.split():
        return 0, len(hypothesis.split()), 0, 0
    import jiwer

    out = jiwer.process_words(reference, hypothesis)
    return out.substitutions, out.insertions, out.deletions, len(reference.split())


def character_counts(reference: str, hypothesis: str) -> tuple[int, int, int, int]:
    """The same for characters, spaces included."""
    if not reference:
        return 0, len(hypothesis), 0, 0
    import jiwer

    out = jiwer.process_characters(reference, hypothesis)
    return out.substitutions, out.insertions, out.deletions, len(reference)


def bootstrap_interval(
    errors: Sequence[int], words: Sequence[int], samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of errors / words when utterances are drawn anew (Bisani & Ney 2004)."""
    rng = np.random.default_rng(seed)
    e, w = np.asarray(errors, dtype=float), np.asarray(words, dtype=float)
    draws = rng.integers(0, len(e), (samples, len(e)))
    rates = e[draws].sum(axis=1) / np.maximum(w[draws].sum(axis=1), 1)
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)
