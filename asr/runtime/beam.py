"""CTC prefix beam search in NumPy, with the scores of a language model over words.

A hypothesis is a prefix of tokens and holds the probability of all its paths, apart for those that
end in a blank and those that end in its last token (Graves 2012; Hannun et al. 2014). All
probabilities are natural logarithms. What is searched for is the largest

    log P_ctc(tokens) + sum over words (lm_weight * log P_lm(word | words before) + word_bonus)

A word counts as soon as a token that begins with `▁` or the end of the recording closes it, so
that characters and BPE pieces are searched alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from asr.runtime.decoding import greedy_decode
from asr.runtime.phrases import Grammar
from asr.runtime.tokenizer import SPACE, UNKNOWN, join

KEPT_PREFIXES = 20000  # known prefixes beyond which those that no hypothesis needs are forgotten
# Natural logarithm, for each token, that a grammar's text may be less likely than the likeliest
# one; on dev-clean it lies between what was said and other phrases.
UNLIKELY = 2.0

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BeamConfig:
    """Options of the search; thresholds are natural logarithms."""

    beam_size: int = field(default=100, metadata={"help": "hypotheses kept in a frame"})
    lm: str = field(
        default="", metadata={"help": "word n-gram model, .lm or .arpa; none", "metavar": "FILE"}
    )
    lm_weight: float = field(default=0.5, metadata={"help": "of the model's log probabilities"})
    word_bonus: float = field(default=0.0, metadata={"help": "added for every word"})
    unknown_penalty: float = field(
        default=1.0, metadata={"help": "taken off for every letter of an unknown word"}
    )
    hotwords: str = field(
        default="",
        metadata={
            "help": "phrases to prefer, or a file with one a line; a number is the bonus of each "
            "word (default: 10): 'raspberry pi, conformer:6'",
            "metavar": "PHRASES",
        },
    )
    grammar: str = field(
        default="",
        metadata={"help": "file of phrases, one a line: nothing else is heard", "metavar": "FILE"},
    )
    token_threshold: float = field(
        default=7.0, metadata={"help": "tokens this far below a frame's best are not tried"}
    )
    beam_threshold: float = field(
        default=10.0, metadata={"help": "hypotheses this far below the best are dropped"}
    )

    def __post_init__(self) -> None:
        if self.beam_size < 1:
            raise ValueError(f"beam_size {self.beam_size} must be at least 1")
        for name in ("lm_weight", "unknown_penalty", "token_threshold", "beam_threshold"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")
        if self.grammar and (self.lm or self.hotwords):
            raise ValueError("a grammar leaves nothing to prefer: use it without lm and hotwords")


class WordScorer(Protocol):
    """A language model over words; states are hashable, and equal where the future is the same."""

    def start(self) -> Any:
        """The state before the first word."""

    def score(self, state: Any, word: str) -> tuple[float, Any]:
        """What `word` adds to the score of a hypothesis in `state`, and the state after it."""

    def end(self, state: Any) -> float:
        """What the end of the sentence adds."""

    def ahead(self, prefix: str) -> float:
        """The most that a word beginning with `prefix` may add: an estimate, for pruning only."""


class Hypothesis(NamedTuple):
    """A result: token ids, log P_ctc of the paths that were kept, and the score with the words."""

    ids: list[int]
    log_prob: float
    score: float


class BeamSearch:
    """Turns log_probs into token ids; `search` gives all the hypotheses that are left.

    `tokens` are the model's, the blank first. Without a `scorer` the likeliest tokens win. A
    `grammar` is one that also forbids tokens: it gives nothing where what is said is none of it.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        config: BeamConfig,
        scorer: WordScorer | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        self.config = config
        self._scorer = grammar or scorer
        self._grammar = grammar
        self._texts = [token.removeprefix(SPACE) for token in tokens]
        self._plain = all(join([text]) == text for text in self._texts[1:])
        self._starts = np.array([t.startswith(SPACE) or t == UNKNOWN for t in tokens])  # (V,)

    def __call__(self, log_probs: npt.NDArray[np.floating]) -> list[int]:
        """Token ids of the best hypothesis for log_probs (T', V); none if none is possible."""
        prefix, log_prob, score = max(self._search(log_probs), key=lambda found: found[2])
        if score == -np.inf:
            return []
        ids = prefix.ids()
        return [] if self._grammar and not likely(log_probs, ids, log_prob) else ids

    def search(self, log_probs: npt.NDArray[np.floating]) -> list[Hypothesis]:
        """The hypotheses left after log_probs (T', V), best first; ValueError for damaged ones."""
        found = sorted(self._search(log_probs), key=lambda found: -found[2])
        return [Hypothesis(prefix.ids(), log_prob, score) for prefix, log_prob, score in found]

    def _search(self, log_probs: npt.NDArray[np.floating]) -> list[tuple[_Prefix, float, float]]:
        """The prefixes of the hypotheses with what else these have."""
        if log_probs.ndim != 2 or log_probs.shape[1] != len(self._texts):
            raise ValueError(
                f"log_probs are {log_probs.shape}; expected (frames, {len(self._texts)})"
            )
        if not np.isfinite(log_probs.max(axis=1)).all():
            raise ValueError("log_probs hold NaN or frames without any token; check the model")
        beam = _Beam(_Prefix(None, 0, self._scorer.start() if self._scorer else None))
        tried = log_probs >= log_probs.max(axis=1, keepdims=True) - self.config.token_threshold
        tried[:, 0] = False  # the blank is no token
        for frame, tokens in zip(log_probs.astype(np.float64), tried, strict=True):
            self._step(beam, frame, np.flatnonzero(tokens))
        return self._finish(beam)

    def _step(self, beam: _Beam, frame: Floats, tokens: npt.NDArray[np.intp]) -> None:
        """One frame (V,) of which `tokens` (C,) may be appended; n is the size of the beam."""
        total = np.logaddexp(beam.blank, beam.token)  # (n,)
        blank = total + frame[0]
        token = beam.token + frame[beam.last]
        if not len(tokens):
            beam.blank, beam.token = blank, token
            return
        repeats = beam.last[:, None] == tokens  # a token needs a blank before it comes again
        new = np.where(repeats, beam.blank[:, None], total[:, None]) + frame[tokens]  # (n, C)

        if self._grammar is not None:
            allowed = [self._grammar.allowed(p.state, p.word)[tokens] for p in beam.prefixes]
            new[~np.array(allowed)] = -np.inf

        column = np.full(len(frame), -1)
        column[tokens] = np.arange(len(tokens))
        child = np.flatnonzero((beam.parent >= 0) & (column[beam.last] >= 0))
        row, at = beam.parent[child], column[beam.last[child]]  # these extensions are in the beam
        token[child] = np.logaddexp(token[child], new[row, at])
        new[row, at] = -np.inf

        stay = np.logaddexp(blank, token) + beam.rank
        starts = self._starts[tokens]
        if self._scorer is not None and starts.any():
            scores = new + np.where(starts, self._closed(beam)[:, None], beam.rank[:, None])
        else:
            scores = new + beam.rank[:, None]
        scores = np.concatenate([stay, scores.ravel()])
        kept = self._best(scores)
        old, added = kept[kept < len(blank)], kept[kept >= len(blank)] - len(blank)
        row, at = np.divmod(added, len(tokens))
        children = [
            self._child(beam, beam.prefixes[i], int(t))
            for i, t in zip(row.tolist(), tokens[at].tolist(), strict=True)
        ]
        beam.replace(
            [beam.prefixes[i] for i in old.tolist()] + children,
            np.concatenate([blank[old], np.full(len(added), -np.inf)]),
            np.concatenate([token[old], new[row, at]]),
            recombine=self._scorer is not None,
        )

    def _best(self, scores: Floats) -> npt.NDArray[np.intp]:
        """Indices of the scores that stay, in order of the indices."""
        near = scores >= scores.max() - self.config.beam_threshold
        kept = np.flatnonzero(near & (scores > -np.inf))
        if len(kept) > self.config.beam_size:
            top = np.argpartition(-scores[kept], self.config.beam_size - 1)
            kept = np.sort(kept[top[: self.config.beam_size]])
        return kept

    def _closed(self, beam: _Beam) -> Floats:
        """Scores (n,) of the words of every hypothesis once its last word is closed."""
        return np.array([p.words + (p.closing or self._close(p))[0] for p in beam.prefixes])

    def _close(self, prefix: _Prefix) -> tuple[float, Any]:
        """What the unfinished last word adds when it ends, and the state then."""
        if prefix.closing is None:
            if self._scorer is None or not prefix.word:
                prefix.closing = 0.0, prefix.state
            else:
                prefix.closing = self._scorer.score(prefix.state, self._written(prefix.word))
        return prefix.closing

    def _child(self, beam: _Beam, parent: _Prefix, token: int) -> _Prefix:
        """The prefix that is `parent` and one more token; there is never a second one."""
        child = beam.known.get((parent, token))
        if child is None:
            child = beam.known[parent, token] = _Prefix(parent, token, parent.state)
            if self._scorer is not None:
                if self._starts[token]:
                    score, child.state = self._close(parent)
                    child.word, child.words = self._texts[token], parent.words + score
                else:
                    child.word, child.words = parent.word + self._texts[token], parent.words
                written = self._written(child.word)
                child.rank = child.words + (self._scorer.ahead(written) if written else 0.0)
                child.future = hash((child.state, child.word, token))
        return child

    def _written(self, word: str) -> str:
        """The text of a word that is spelled by tokens."""
        return word if self._plain else join([word])

    def _finish(self, beam: _Beam) -> list[tuple[_Prefix, float, float]]:
        """The end of the recording closes the last words and the sentence."""
        found = []
        log_probs = np.logaddexp(beam.blank, beam.token).tolist()
        for prefix, log_prob in zip(beam.prefixes, log_probs, strict=True):
            score, state = self._close(prefix)
            if self._scorer is not None:
                score += prefix.words + self._scorer.end(state)
            found.append((prefix, log_prob, log_prob + score))
        return found


class _Prefix:
    """A prefix of tokens as a leaf of a tree that grows towards the root.

    `words` is the score of the closed words, `rank` that with what `word`, the unfinished one,
    promises; `state` is the language model's before `word`. `future` stands for all that what
    comes next depends on.
    """

    __slots__ = ("closing", "future", "parent", "rank", "state", "token", "word", "words")

    def __init__(self, parent: _Prefix | None, token: int, state: Any) -> None:
        self.parent = parent
        self.token = token
        self.state = state
        self.word = ""
        self.words = 0.0
        self.rank = 0.0
        self.future = 0
        self.closing: tuple[float, Any] | None = None

    def ids(self) -> list[int]:
        """The tokens from the first to the last."""
        ids = []
        at: _Prefix = self
        while at.parent is not None:
            ids.append(at.token)
            at = at.parent
        return ids[::-1]


class _Beam:
    """The n hypotheses of a frame; arrays are (n,).

    `blank` and `token` are the log probabilities of the paths that end in a blank and in the
    `last` token; `parent` is the place of the prefix without the last token, or -1.
    """

    def __init__(self, root: _Prefix) -> None:
        self.known: dict[tuple[_Prefix, int], _Prefix] = {}
        self._limit = KEPT_PREFIXES
        self.replace([root], np.zeros(1), np.full(1, -np.inf))

    def replace(
        self, prefixes: list[_Prefix], blank: Floats, token: Floats, recombine: bool = False
    ) -> None:
        """Takes the hypotheses of the next frame, of those with one future only the best."""
        rank = np.array([p.rank for p in prefixes])
        if recombine:
            kept = unlike(prefixes, np.logaddexp(blank, token) + rank)
            if len(kept) < len(prefixes):
                prefixes = [prefixes[i] for i in kept]
                blank, token, rank = blank[kept], token[kept], rank[kept]
        self.prefixes, self.blank, self.token, self.rank = prefixes, blank, token, rank
        self.last = np.array([p.token for p in prefixes])
        place: dict[_Prefix | None, int] = {p: i for i, p in enumerate(prefixes)}
        self.parent = np.array([place.get(p.parent, -1) for p in prefixes])
        if len(self.known) > self._limit:
            self._forget()

    def _forget(self) -> None:
        """Lets go of all prefixes but the hypotheses and what they begin with."""
        kept = {}
        for prefix in self.prefixes:
            at = prefix
            while at.parent is not None and (at.parent, at.token) not in kept:
                kept[at.parent, at.token] = at
                at = at.parent
        self.known = kept
        self._limit = len(kept) + KEPT_PREFIXES


def likely(log_probs: npt.NDArray[np.floating], ids: list[int], log_prob: float) -> bool:
    """Whether ids of which the paths have `log_prob` can be what log_probs (T', V) hold."""
    best = float(log_probs.max(axis=1).sum())
    length = max(len(ids), len(greedy_decode(log_probs)), 1)
    return best - log_prob < UNLIKELY * length


def unlike(prefixes: list[_Prefix], scores: Floats) -> list[int]:
    """Which to keep so that none has the future of a better one: it can hardly win any more.

    Hardly, as the better one may end in a blank less surely. Without this a beam fills with texts
    that differ in a word long past.
    """
    best: dict[int, int] = {}
    for i in np.argsort(-scores, kind="stable").tolist():
        best.setdefault(prefixes[i].future, i)
    return sorted(best.values())
