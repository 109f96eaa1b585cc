"""Word and character error rate over a corpus, counted by jiwer; intervals; comparisons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = tuple[int, int, int, int]  # substitutions, insertions, deletions, reference units


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, Any]:
    """Corpus `wer` and `cer` with counts of substitutions, insertions and deletions.

    Rates are errors over reference words (characters, spaces counted); an empty reference counts
    its hypothesis as insertions. Raises ValueError if there is no reference word at all.
    """
    words = [word_counts(r, h) for r, h in zip(references, hypotheses, strict=True)]
    chars = [character_counts(r, h) for r, h in zip(references, hypotheses, strict=True)]
    return corpus_rates(words, chars)


def corpus_rates(words: Sequence[Counts], characters: Sequence[Counts]) -> dict[str, Any]:
    """The rates of `error_rates` from the counts of every utterance."""
    totals, char_totals = np.sum(words, axis=0), np.sum(characters, axis=0)
    if len(words) == 0 or totals[3] == 0:
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


def word_counts(reference: str, hypothesis: str) -> Counts:
    """Substitutions, insertions, deletions and reference words of one utterance."""
    if not reference.split():
        return 0, len(hypothesis.split()), 0, 0
    import jiwer

    out = jiwer.process_words(reference, hypothesis)
    return out.substitutions, out.insertions, out.deletions, len(reference.split())


def character_counts(reference: str, hypothesis: str) -> Counts:
    """The same for characters, spaces included."""
    if not reference:
        return 0, len(hypothesis), 0, 0
    import jiwer

    out = jiwer.process_characters(reference, hypothesis)
    return out.substitutions, out.insertions, out.deletions, len(reference)


def common_confusions(
    references: Sequence[str], hypotheses: Sequence[str], most: int = 10
) -> list[tuple[str, str, int]]:
    """The most frequent (said, heard, count); '' stands for a word left out or put in."""
    import jiwer

    pairs: Counter[tuple[str, str]] = Counter()
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        said, heard = reference.split(), hypothesis.split()
        if not said:
            pairs.update(("", word) for word in heard)
            continue
        for c in jiwer.process_words(reference, hypothesis).alignments[0]:
            left, right = (
                said[c.ref_start_idx : c.ref_end_idx],
                heard[c.hyp_start_idx : c.hyp_end_idx],
            )
            if c.type == "substitute":
                pairs.update(zip(left, right, strict=True))
            elif c.type == "delete":
                pairs.update((word, "") for word in left)
            elif c.type == "insert":
                pairs.update(("", word) for word in right)
    ranked = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return [(said, heard, count) for (said, heard), count in ranked[:most]]


def bootstrap_interval(
    errors: Sequence[int], words: Sequence[int], samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of errors / words when utterances are drawn anew (Bisani & Ney 2004)."""
    e, w = np.asarray(errors, dtype=float), np.asarray(words, dtype=float)
    draws = _draws(len(e), samples, seed)
    rates = [e[draw].sum() / max(w[draw].sum(), 1) for draw in draws]
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(
    errors: Sequence[int], others: Sequence[int], words: Sequence[int],
    samples: int = 2000, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """How much higher the error rate of `errors` is than that of `others` on the same utterances.

    `delta` of the rates with its 95 % `interval`, and `better`: the share of draws in which
    `errors` has fewer (Bisani & Ney 2004).
    """
    difference = np.asarray(errors, dtype=float) - np.asarray(others, dtype=float)
    w = np.asarray(words, dtype=float)
    draws = _draws(len(w), samples, seed)
    deltas = np.array([difference[draw].sum() / max(w[draw].sum(), 1) for draw in draws])
    low, high = np.percentile(deltas, [2.5, 97.5])
    return {
        "delta": float(difference.sum() / w.sum()),
        "interval": [float(low), float(high)],
        "better": float((deltas < 0).mean()),
    }


def _draws(n: int, samples: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """`samples` times the indices of n utterances drawn with replacement."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, n, n) for _ in range(samples))
