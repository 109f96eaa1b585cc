"""How far two models say the same: in frames, in words, in whole utterances."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from asr.common.metrics import word_counts


def frame_agreement(
    mine: Sequence[npt.NDArray[np.int64]], theirs: Sequence[npt.NDArray[np.int64]], blank: int = 0
) -> dict[str, float]:
    """Shares of frames with the same best token, given those of each utterance (T',).

    `frames` of all; `non_blank` of those where the second model's is not blank (NaN for none).
    """
    a, b = (np.concatenate([np.asarray(x) for x in one]) for one in (mine, theirs))
    if a.shape != b.shape:
        raise ValueError("the two models have other frames: their frame rates differ")
    spoken = b != blank
    return {
        "frames": float((a == b).mean()),
        "non_blank": float((a == b)[spoken].mean()) if spoken.any() else float("nan"),
    }


def text_agreement(mine: Sequence[str], theirs: Sequence[str]) -> dict[str, float]:
    """`words`: 1 - the word error rate against the second model's texts; `utterances`: the same.

    At least 0; a second model that says nothing at all is agreed with by saying nothing.
    """
    counts = [word_counts(said, heard) for heard, said in zip(mine, theirs, strict=True)]
    errors, words = sum(sum(c[:3]) for c in counts), sum(c[3] for c in counts)
    same = [a == b for a, b in zip(mine, theirs, strict=True)]
    return {
        "words": max(0.0, 1 - errors / words) if words else float(errors == 0),
        "utterances": sum(same) / len(same),
    }
