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

from asr.runtime.phrases import Grammar
from asr.runtime.rejection import is_said
from asr.runtime.tokenizer import SPACE, UNKNOWN, join

KEPT_PREFIXES = 20000  # known prefixes beyond which those that no hypothesis needs are forgotten
# Natural logarithm: a word that closes seldom brings so much more than its beginning has promised.
CLOSING = 1.0

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]


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
        default=8.0, metadata={"help": "hypotheses this far below the best are dropped"}
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
        self._tokens = tokens
        self._texts = [token.removeprefix(SPACE) for token in tokens]
        self._plain = all(join([text]) == text for text in self._texts[1:])
        self._starts = np.array([t.startswith(SPACE) or t == UNKNOWN for t in tokens])  # (V,)

    def __call__(self, log_probs: npt.NDArray[np.floating]) -> list[int]:
        """Token ids of the best hypothesis for log_probs (T', V); none if none is possible."""
        prefix, _, score = max(self._search(log_probs), key=lambda found: found[2])
        if score == -np.inf:
            return []
        ids = prefix.ids()
        return [] if self._grammar and not is_said(log_probs, ids, self._tokens) else ids

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

    def _step(self, beam: _Beam, frame: Floats, tokens: Ints) -> None:
        """One frame (V,) of which `tokens` (C,) may be appended; n is the size of the beam."""
        blank = beam.total + frame[0]  # (n,)
        token = beam.token + frame[beam.last]
        if not len(tokens):
            beam.blank, beam.token, beam.total = blank, token, np.logaddexp(blank, token)
            return
        new = beam.total[:, None] + frame[tokens]  # (n, C)
        column = np.full(len(frame), -1)
        column[tokens] = np.arange(len(tokens))
        at = column[beam.last]
        again = np.flatnonzero(at >= 0)  # a token needs a blank before it comes again
        at = at[again]
        new[again, at] = beam.blank[again] + frame[tokens[at]]

        if self._grammar is not None:
            allowed = [self._grammar.allowed(p.state, p.word)[tokens] for p in beam.prefixes]
            new[~np.array(allowed)] = -np.inf

        inside = beam.parent[again] >= 0  # extensions that are in the beam
        inner, row, at = again[inside], beam.parent[again[inside]], at[inside]
        token[inner] = np.logaddexp(token[inner], new[row, at])
        new[row, at] = -np.inf

        total = np.logaddexp(blank, token)
        scores = self._scores(beam, total, new, self._starts[tokens])
        beam.blank, beam.token, beam.total = blank, token, total
        kept = self._best(scores)
        old, added = kept[kept < len(total)], kept[kept >= len(total)] - len(total)
        row, at = np.divmod(added, len(tokens))
        least = scores[old].max(initial=-np.inf) - self.config.beam_threshold
        children: list[_Prefix] = []
        log_probs: list[float] = []
        for i, t, log_prob in zip(
            row.tolist(), tokens[at].tolist(), new[row, at].tolist(), strict=True
        ):
            if child := self._child(beam, beam.prefixes[i], t, least - log_prob):
                children.append(child)
                log_probs.append(log_prob)
        if children or len(old) < len(total):
            beam.change(old, children, log_probs, recombine=self._scorer is not None)

    def _scores(
        self, beam: _Beam, total: Floats, new: Floats, starts: npt.NDArray[np.bool_]
    ) -> Floats:
        """Scores (n + n C,) of what stays and of its extensions `new` (n, C), where `starts` begin.

        A word that such a token closes has its score if it is near enough.
        """
        stay = total + beam.rank
        scores = new + beam.rank[:, None]
        if self._scorer is not None and starts.any():
            best = max(stay.max(), scores[:, ~starts].max(initial=-np.inf))
            least = best - self.config.beam_threshold - CLOSING
            ends = np.full(len(total), -np.inf)
            for i in np.flatnonzero(scores[:, starts].max(axis=1) >= least).tolist():
                prefix = beam.prefixes[i]
                ends[i] = prefix.words + self._close(prefix)[0]
            scores = new + np.where(starts, ends[:, None], beam.rank[:, None])
        return np.concatenate([stay, scores.ravel()])

    def _best(self, scores: Floats) -> Ints:
        """Indices of the scores that stay, in order of the indices."""
        near = scores >= scores.max() - self.config.beam_threshold
        kept = np.flatnonzero(near & (scores > -np.inf))
        if len(kept) > self.config.beam_size:
            top = np.argpartition(-scores[kept], self.config.beam_size - 1)
            kept = np.sort(kept[top[: self.config.beam_size]])
        return kept

    def _close(self, prefix: _Prefix) -> tuple[float, Any]:
        """What the unfinished last word adds when it ends, and the state then."""
        if prefix.closing is None:
            if self._scorer is None or not prefix.word:
                prefix.closing = 0.0, prefix.state
            else:
                prefix.closing = self._scorer.score(prefix.state, self._written(prefix.word))
        return prefix.closing

    def _child(self, beam: _Beam, parent: _Prefix, token: int, least: float) -> _Prefix | None:
        """The prefix that is `parent` and one more token, if its rank is not below `least`.

        There is never a second one.
        """
        child = beam.known.get((parent, token))
        if child is None:
            word, words, state = parent.word + self._texts[token], parent.words, parent.state
            rank = 0.0
            if self._scorer is not None:
                if self._starts[token]:
                    score, state = self._close(parent)
                    word, words = self._texts[token], words + score
                written = self._written(word)
                rank = words + (self._scorer.ahead(written) if written else 0.0)
                if rank < least:
                    return None
            child = beam.known[parent, token] = _Prefix(parent, token, state, word, words, rank)
        return child if child.rank >= least else None

    def _written(self, word: str) -> str:
        """The text of a word that is spelled by tokens."""
        return word if self._plain else join([word])

    def _finish(self, beam: _Beam) -> list[tuple[_Prefix, float, float]]:
        """The end of the recording closes the last words and the sentence."""
        found = []
        for prefix, log_prob in zip(beam.prefixes, beam.total.tolist(), strict=True):
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

    def __init__(
        self, parent: _Prefix | None, token: int, state: Any,
        word: str = "", words: float = 0.0, rank: float = 0.0,
    ) -> None:  # fmt: skip
        self.parent = parent
        self.token = token
        self.state = state
        self.word = word
        self.words = words
        self.rank = rank
        self.future = hash((state, word, token))
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
    `last` token, `total` is that of both; `parent` is the place of the prefix without the last
    token, or -1.
    """

    def __init__(self, root: _Prefix) -> None:
        self.known: dict[tuple[_Prefix, int], _Prefix] = {}
        self._limit = KEPT_PREFIXES
        self.blank, self.token, self.total = np.zeros(1), np.full(1, -np.inf), np.zeros(1)
        self._take([root])

    def change(
        self, kept: Ints, children: list[_Prefix], log_probs: list[float], recombine: bool
    ) -> None:
        """Keeps these of the hypotheses, and `children` behind them.

        To `recombine` is to keep, of those with one future, only the best.
        """
        prefixes = [self.prefixes[i] for i in kept.tolist()] + children
        blank = np.concatenate([self.blank[kept], np.full(len(children), -np.inf)])
        token = np.concatenate([self.token[kept], log_probs])
        total = np.concatenate([self.total[kept], log_probs])
        if recombine:
            best = unlike(prefixes, total)
            if len(best) < len(prefixes):
                prefixes = [prefixes[i] for i in best]
                blank, token, total = blank[best], token[best], total[best]
        self.blank, self.token, self.total = blank, token, total
        self._take(prefixes)

    def _take(self, prefixes: list[_Prefix]) -> None:
        self.prefixes = prefixes
        self.rank = np.array([p.rank for p in prefixes])
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


def unlike(prefixes: list[_Prefix], log_probs: Floats) -> list[int]:
    """Which to keep so that none has the future of a better one: it can hardly win any more.

    Hardly, as the better one may end in a blank less surely. Without this a beam fills with texts
    that differ in a word long past.
    """
    best: dict[int, tuple[float, int]] = {}
    for i, (prefix, log_prob) in enumerate(zip(prefixes, log_probs.tolist(), strict=True)):
        score = log_prob + prefix.rank
        if prefix.future not in best or score > best[prefix.future][0]:
            best[prefix.future] = score, i
    return sorted(i for _, i in best.values())
