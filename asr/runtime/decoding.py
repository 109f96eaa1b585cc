"""Greedy CTC decoding in NumPy: best token per frame, merge repeats, drop blanks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def greedy_decode(log_probs: npt.NDArray[np.floating], blank_id: int = 0) -> list[int]:
    """Token ids of one utterance's log_probs (T', V)."""
    best = log_probs.argmax(axis=-1)  # (T',)
    first_of_run = np.diff(best, prepend=-1) != 0
    return [int(i) for i in best[first_of_run & (best != blank_id)]]


def greedy_decode_batch(
    log_probs: npt.NDArray[np.floating], lengths: npt.NDArray[np.integer], blank_id: int = 0
) -> list[list[int]]:
    """Token ids of each utterance of log_probs (B, T', V), padded after `lengths` (B,)."""
    return [greedy_decode(x[:n], blank_id) for x, n in zip(log_probs, lengths, strict=True)]
