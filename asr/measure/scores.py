"""What texts are worth against their references: rates, intervals, comparisons of two results."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from asr.common.metrics import (
    bootstrap_interval,
    character_counts,
    common_confusions,
    corpus_rates,
    paired_bootstrap,
    word_counts,
)
from asr.corpus.manifest import Utterance
from asr.runtime.tokenizer import SPACE, name_character

Row = dict[str, Any]  # an utterance in a result
WORST = 10


def score(utterances: Sequence[Utterance], texts: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Rates with their intervals, every utterance's counts and texts, the worst, the confusions."""
    references = [u.text for u in utterances]
    words = [word_counts(r, h) for r, h in zip(references, texts, strict=True)]
    characters = [character_counts(r, h) for r, h in zip(references, texts, strict=True)]
    result = corpus_rates(words, characters)
    for name, counts in (("wer", words), ("cer", characters)):
        errors, totals = [sum(c[:3]) for c in counts], [c[3] for c in counts]
        result[f"{name}_interval"] = list(bootstrap_interval(errors, totals, seed=seed))
    rows: list[Row] = [
        describe_utterance(u) | {
            "word_errors": sum(w[:3]), "characters": c[3], "character_errors": sum(c[:3]),
            "reference": u.text, "hypothesis": text, "digest": digest(text),
        }
        for u, text, w, c in zip(utterances, texts, words, characters, strict=True)
    ]  # fmt: skip
    worst = sorted(rows, key=lambda r: (-r["word_errors"], -r["character_errors"], r["id"]))
    return result | {
        "seconds": round(sum(u.duration for u in utterances), 3),
        "worst": [r for r in worst[:WORST] if r["word_errors"]],
        "confusions": common_confusions(references, texts),
        "utterances": rows,
    }


def unwritable(utterances: Sequence[Utterance], tokens: Sequence[str]) -> dict[str, int]:
    """The characters of the texts that no token has, and in how many texts, the most first."""
    letters = "".join(tokens[1:])
    known = set(letters + letters.lower()) - {SPACE} | {" "}  # references are in lower case
    counts = Counter(c for u in utterances for c in set(u.text) - known)
    return {name_character(c): n for c, n in counts.most_common()}


def by_set(
    rows: Sequence[Row], sets: Sequence[tuple[str, int]], seed: int = 0
) -> list[dict[str, Any]]:
    """The rates of each test set, given its name and how many of the rows, in order, are its."""
    found, at = [], 0
    for name, count in sets:
        part, at = rows[at : at + count], at + count
        entry: dict[str, Any] = {"test_data": name, "utterances": count}
        for rate, unit in (("wer", "word"), ("cer", "character")):
            errors, totals = ([row[k] for row in part] for k in (f"{unit}_errors", f"{unit}s"))
            entry |= {
                f"{unit}s": sum(totals), rate: sum(errors) / max(sum(totals), 1),
                f"{rate}_interval": list(bootstrap_interval(errors, totals, seed=seed)),
            }  # fmt: skip
        found.append(entry)
    return found


def compare(result: dict[str, Any], other: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Paired comparison of two results on the same utterances; positive deltas: `other` is better.

    Raises ValueError where the utterances are not the same ones.
    """
    mine, theirs = align(result["utterances"], other["utterances"])
    out: dict[str, Any] = {}
    for name, unit in (("wer", "word"), ("cer", "character")):
        errors, others = ([row[f"{unit}_errors"] for row in rows] for rows in (mine, theirs))
        totals = [row[f"{unit}s"] for row in mine]
        out[name] = paired_bootstrap(errors, others, totals, seed=seed)
    if all("digest" in row for row in (*mine, *theirs)):
        same = [a["digest"] == b["digest"] for a, b in zip(mine, theirs, strict=True)]
        out["identical"] = sum(same) / len(same)
    return out | {"utterances": len(mine)}


def align(rows: Sequence[Row], others: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Both sorted alike; ValueError where they are not of the same utterances."""
    mine, theirs = (
        sorted(part, key=lambda row: (row["id"], row["duration"], row["words"]))
        for part in (rows, others)
    )
    if [(row["id"], row["words"]) for row in mine] != [(row["id"], row["words"]) for row in theirs]:
        raise ValueError("the two results are not of the same utterances; evaluate both on one set")
    return mine, theirs


def pick(row: Row) -> tuple[str, int]:
    """What tells an utterance in two results."""
    return row["id"], row["words"]


def describe_utterance(utterance: Utterance) -> Row:
    """What identifies an utterance in a result."""
    return {
        "id": utterance.id,
        "duration": round(utterance.duration, 3),
        "words": len(utterance.text.split()),
    }


def digest(text: str) -> str:
    """Tells texts apart in results that must not hold them."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]
