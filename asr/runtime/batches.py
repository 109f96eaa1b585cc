"""Many recordings: their pieces run together in the network, their results come in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asr.runtime.pieces import Piece
from asr.runtime.result import Result

if TYPE_CHECKING:
    from asr.runtime.recognizer import Array, Recognizer


@dataclass(frozen=True)
class End:
    """Stands behind the pieces of a recording; `error` is why it could not be read, if so."""

    error: Exception | None = None


def transcribe_many(
    recognizer: Recognizer, recordings: Iterable[Iterable[Array]], batch_size: int
) -> Iterator[Result | Exception]:
    """The result of each recording, or why it cannot be read; each comes in blocks (n,).

    No more is read ahead than the pieces of a batch; results are those of recordings alone.
    """
    read = run_together(recognizer, ended(recognizer, recordings), batch_size)
    ends: list[End] = []

    def own() -> Iterator[tuple[Piece, Array]]:
        for item in read:
            if isinstance(item, End):
                ends.append(item)
                return
            yield item

    while True:
        segments = tuple(recognizer.spoken(recognizer.joined(own())))
        if not ends:
            return
        yield ends.pop().error or Result(segments)


def ended(recognizer: Recognizer, recordings: Iterable[Iterable[Array]]) -> Iterator[Piece | End]:
    """The pieces of all recordings, and the end of each."""
    for blocks in recordings:
        try:
            yield from recognizer.pieces(blocks)
            yield End()
        except (ValueError, OSError) as error:
            yield End(error)


def run_together(
    recognizer: Recognizer, pieces: Iterable[Piece | End], batch_size: int
) -> Iterator[tuple[Piece, Array] | End]:
    """Each piece with its log_probs (T', V), `batch_size` of them run at once; ends stay."""
    taken: list[Piece | End] = []
    for piece in pieces:
        taken.append(piece)
        if sum(isinstance(one, Piece) for one in taken) in (0, batch_size):
            yield from run_batch(recognizer, taken)
            taken = []
    yield from run_batch(recognizer, taken)


def run_batch(
    recognizer: Recognizer, taken: Sequence[Piece | End]
) -> Iterator[tuple[Piece, Array] | End]:
    """Those that are pieces with their log_probs (T', V), run as one batch."""
    pieces = [piece for piece in taken if isinstance(piece, Piece)]
    outputs = iter(recognizer.piece_log_probs(pieces))
    for piece in taken:
        yield piece if isinstance(piece, End) else (piece, next(outputs))
