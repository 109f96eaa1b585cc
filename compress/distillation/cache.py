"""A teacher's answers, asked for once: of every frame the likeliest tokens, in half precision.

A folder with index.json (whose answers, and where each recording's begin), tokens.npy and
values.npy (frames, top). Recordings are known by their bytes, so one cache serves every run on the
same speech. What the tokens left out have together is shared out among them evenly.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from asr.corpus.manifest import Utterance
from asr.runtime.files import write_atomically

VERSION = 1
LEAST = 1e-8  # share that all tokens left out have at least


class CacheError(ValueError):
    """A cache of another teacher or of other speech, or a damaged one."""


class Cache:
    """The answers about `utterances`; `answers` takes positions in that list."""

    def __init__(
        self, folder: Path, teacher: str, vocab_size: int, utterances: Sequence[Utterance]
    ) -> None:
        try:
            index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            if index["version"] != VERSION:
                raise CacheError(f"{folder}: a cache of another version; delete it or name another")
            of_another = index["teacher"] != teacher
            self.vocab_size = index["vocab_size"]
            self.values = np.load(folder / "values.npy", mmap_mode="r")
            self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, CacheError):
                raise
            raise CacheError(f"{folder}: a damaged cache ({error}); delete it") from None
        if of_another or self.vocab_size != vocab_size:
            raise CacheError(
                f"{folder}: a cache of another teacher; name another --cache, or delete this one"
            )
        self.places: list[tuple[int, int]] = []
        for utterance in utterances:
            place = index["recordings"].get(recording_digest(utterance))
            if place is None:
                raise CacheError(
                    f"{folder}: holds no answers about {utterance.audio_filepath}, which was "
                    "changed or added since; name another --cache, or delete this one"
                )
            self.places.append((place[0], place[1]))

    def answers(self, indices: Sequence[int], frames: int) -> Tensor:
        """Log-probabilities (B, T', V) of these utterances, padded to T' `frames`.

        One frame fewer than the teacher heard is left where augmentation shifts a recording.
        """
        found = torch.zeros(len(indices), frames, self.vocab_size)
        for row, i in zip(found, indices, strict=True):
            start, count = self.places[i]
            count = min(count, frames)
            values = torch.from_numpy(np.array(self.values[start : start + count])).float()
            tokens = torch.from_numpy(np.array(self.tokens[start : start + count])).long()
            others = self.vocab_size - values.shape[1]
            if others:
                rest = (1 - values.exp().sum(1)).clamp(min=LEAST)  # (T',)
                row[:count] = (rest / others).log().unsqueeze(1)
            row[:count].scatter_(1, tokens, values)
        return found


def recording_digest(utterance: Utterance) -> str:
    """Of the file's bytes."""
    try:
        data = Path(utterance.audio_filepath).read_bytes()
    except OSError as error:
        raise ValueError(f"{utterance.audio_filepath}: {error.strerror}") from None
    return hashlib.sha256(data).hexdigest()[:24]


def write_cache(
    folder: Path, teacher: str, top: int, vocab_size: int, utterances: Sequence[Utterance],
    said: Callable[[], Iterable[tuple[int, Tensor]]],
) -> None:  # fmt: skip
    """Writes a cache whole or not at all.

    `said` gives each utterance's position with what the teacher says of it (T', V).
    """
    top = min(top, vocab_size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        values, tokens = [], []
        places: dict[str, list[int]] = {}
        start = 0
        for position, log_probs in said():
            best = log_probs.topk(top, dim=1)
            values.append(best.values.clamp(min=-math.log(6e4)).to(torch.float16).numpy())
            tokens.append(best.indices.to(torch.int32).numpy().astype(np.uint16))
            places[recording_digest(utterances[position])] = [start, len(log_probs)]
            start += len(log_probs)
        np.save(temporary / "values.npy", np.concatenate(values))
        np.save(temporary / "tokens.npy", np.concatenate(tokens))
        index = {"version": VERSION, "teacher": teacher, "vocab_size": vocab_size, "top": top,
                 "recordings": places}  # fmt: skip
        write_atomically(temporary / "index.json", json.dumps(index) + "\n")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
