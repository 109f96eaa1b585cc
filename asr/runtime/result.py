"""What a recording says: its text, in segments and words with times and confidence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from asr.runtime.words import Word

PAUSE = 0.5  # seconds between words that end a segment


@dataclass(frozen=True)
class Segment:
    """Words between two pauses."""

    words: tuple[Word, ...]

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)

    @property
    def start(self) -> float:
        """Seconds from the beginning of the recording to the first word."""
        return self.words[0].start

    @property
    def end(self) -> float:
        """Seconds from the beginning of the recording to the end of the last word."""
        return self.words[-1].end

    @property
    def confidence(self) -> float:
        """The share of the words that is expected to be right."""
        return sum(word.confidence for word in self.words) / len(self.words)


@dataclass(frozen=True)
class Result:
    """A recording's segments in their order; `str(result)` is its text."""

    segments: tuple[Segment, ...] = field(default=())

    @property
    def words(self) -> tuple[Word, ...]:
        return tuple(word for segment in self.segments for word in segment.words)

    @property
    def text(self) -> str:
        return " ".join(segment.text for segment in self.segments)

    @property
    def confidence(self) -> float:
        """The share of the words that is expected to be right; 0 where there are none."""
        words = self.words
        return sum(word.confidence for word in words) / len(words) if words else 0.0

    def __str__(self) -> str:
        return self.text


def split_at_pauses(words: Iterable[Word]) -> Iterator[Segment]:
    """The words in segments; a new one begins after a pause of `PAUSE` seconds or more."""
    said: list[Word] = []
    for word in words:
        if said and word.start - said[-1].end >= PAUSE:
            yield Segment(tuple(said))
            said = []
        said.append(word)
    if said:
        yield Segment(tuple(said))
