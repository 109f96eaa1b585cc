"""Whether a phrase that a grammar allows is what was said, or only the nearest of its phrases.

The paths of what was heard are compared with the likeliest one of all, word by word: a sentence
with one other word is another sentence, however well the rest fits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from asr.runtime.tokenizer import join, word_spans
from asr.runtime.words import align

# Natural logarithm: a phrase was said if its worst word is no less likely than that. Chosen on
# dev-clean (experiments/grammar.json), where a twentieth of what is said is refused.
UNLIKELY = 2.0
EXTRA = 2  # tokens: short words are judged more mildly


def is_said(log_probs: npt.NDArray[np.floating], ids: Sequence[int], tokens: Sequence[str]) -> bool:
    """Whether log_probs (T', V) hold the token ids rather than something else."""
    return worst_word(log_probs, ids, tokens) < UNLIKELY


def worst_word(
    log_probs: npt.NDArray[np.floating], ids: Sequence[int], tokens: Sequence[str]
) -> float:
    """By how much the worst word of ids is less likely than the likeliest tokens in its frames.

    Natural logarithm for each token, its own or the likeliest ones, whichever are more, and EXTRA.
    The frames between two words belong to the nearer one. Infinite for ids without a word.
    """
    texts = [tokens[i] for i in ids]
    words = [(a, b) for a, b in word_spans(texts) if join(texts[a:b])]
    if not words:
        return np.inf
    spans = align(log_probs, ids)  # (L, 2)
    path = np.zeros(len(log_probs), np.intp)
    for i, (first, stop) in zip(ids, spans.tolist(), strict=True):
        path[first:stop] = i
    likeliest = log_probs.argmax(axis=1)
    lost = log_probs.max(axis=1) - log_probs[np.arange(len(path)), path]  # (T',)
    begins = (likeliest != 0) & (np.diff(likeliest, prepend=0) != 0)  # a token of the likeliest
    borders = [0, *((spans[b - 1, 1] + spans[b, 0] + 1) // 2 for _, b in words[:-1]), len(path)]
    return max(
        float(lost[a:b].sum()) / (EXTRA + max(stop - first, int(begins[a:b].sum())))
        for a, b, (first, stop) in zip(borders, borders[1:], words, strict=False)
    )
