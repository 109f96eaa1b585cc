"""ARPA files read in plain Python, and as much of kenlm's interface as asr uses."""

from __future__ import annotations

from pathlib import Path


class Arpa:
    """log10 probabilities with back-off, as the format's definition has them."""

    def __init__(self, path: str | Path) -> None:
        self.log: dict[tuple[str, ...], float] = {}
        self.backoff: dict[tuple[str, ...], float] = {}
        self.order = 0
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            if line.endswith("-grams:"):
                self.order = int(line[1:-7])
            elif "\t" in line:
                log, words, *backoff = line.split("\t")
                gram = tuple(words.split(" "))
                assert len(gram) == self.order
                self.log[gram] = float(log)
                self.backoff[gram] = float(backoff[0]) if backoff else 0.0
        if not self.log:
            raise OSError("no n-grams")

    @property
    def words(self) -> list[str]:
        return [gram[0] for gram in self.log if len(gram) == 1]

    def log10(self, word: str, history: tuple[str, ...] = ()) -> float:
        """log10 P(word | history)."""
        if (word,) not in self.log:
            word = "<unk>"
        history = history[max(0, len(history) - self.order + 1) :]
        if (*history, word) in self.log:
            return self.log[(*history, word)]
        return self.backoff.get(history, 0.0) + self.log10(word, history[1:])


class State:
    """The words before."""

    history: tuple[str, ...] = ()


class Model(Arpa):
    """A stand-in for kenlm.Model."""

    def __init__(self, path: str, config: object = None) -> None:
        super().__init__(path)

    def __contains__(self, word: str) -> bool:
        return (word,) in self.log and word != "<unk>"

    def BeginSentenceWrite(self, state: State) -> None:  # noqa: N802
        state.history = ("<s>",)

    def NullContextWrite(self, state: State) -> None:  # noqa: N802
        state.history = ()

    def BaseScore(self, before: State, word: str, after: State) -> float:  # noqa: N802
        after.history = (*before.history, word)
        return self.log10(word, before.history)


class Config:
    """A stand-in for kenlm.Config."""


class ARPALoadComplain:
    """A stand-in for kenlm.ARPALoadComplain."""

    NONE = 0
