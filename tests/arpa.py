"""ARPA files read in plain Python, by the definition of the format."""

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
