"""Speech to text with one model file: `load(path).transcribe(...)` for `.onnx` and `.pt`.

An `.onnx` file needs NumPy, onnxruntime and soundfile only; torch is imported for a `.pt`. Audio is
cut in pauses into segments of at most 25 seconds (see `pieces`), so the memory of the network
does not grow with the recording.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from asr.runtime.audio import Source, check_waveform, read_blocks
from asr.runtime.backends import Backend, open_model
from asr.runtime.batches import transcribe_many
from asr.runtime.beam import BeamConfig
from asr.runtime.decoding import greedy_decode
from asr.runtime.features import log_mel, n_frames, subsampled_length
from asr.runtime.level import settle_level
from asr.runtime.pauses import settle
from asr.runtime.pieces import Piece, cut_in_pauses
from asr.runtime.readings import Reading, join
from asr.runtime.result import Result, Segment, split_at_pauses
from asr.runtime.shipped import find_language_model, find_model
from asr.runtime.sources import AudioWarning, name_of
from asr.runtime.tokenizer import Tokenizer
from asr.runtime.vad import Detector, find_speech
from asr.runtime.words import Word, read_words

if TYPE_CHECKING:
    from asr.runtime.live import Event

Array = npt.NDArray[np.float32]
Audio = Source | npt.NDArray[Any]  # a recording

MIN_CONFIDENCE = 0.2  # of a segment; what is heard in music and noise is less sure
SILENCE = 2.0**-14  # what stays below this (-84 dBFS), two steps of 16 bits, holds no speech


class Recognizer:
    """Audio to text; made by `load`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.info = backend.info
        self.one_at_a_time = self.info.one_at_a_time
        self.tokenizer = Tokenizer(self.info.tokens)
        self.detector: Detector | None = find_speech  # None: all of a recording is read
        self.decoder: Callable[[Array], list[int]] = greedy_decode
        self.worded = False  # the decoder has a language model over words
        self.min_confidence = MIN_CONFIDENCE  # segments less sure than that are left out

    @overload
    def transcribe(  # type: ignore[overload-overlap]
        self, audio: Audio, sample_rate: int = 16000, channel: int | None = None
    ) -> Result: ...
    @overload
    def transcribe(
        self, audio: Iterable[Audio], sample_rate: int = 16000, channel: int | None = None,
        batch_size: int = 1,
    ) -> Iterator[Result]: ...  # fmt: skip
    def transcribe(
        self, audio: Audio | Iterable[Audio], sample_rate: int = 16000, channel: int | None = None,
        batch_size: int = 1,
    ) -> Result | Iterator[Result]:  # fmt: skip
        """What a recording says; of a list or another iterable of them each result as it comes.

        A recording is the path of an audio file ("-" for standard input), a binary file that is
        open, or a waveform (N,) in [-1, 1] at `sample_rate` Hz, a NumPy array; a file brings its
        own sample rate. Of several channels, `channel` (from 0) is heard, or their mean. Silence
        and noise give a result without words. Memory does not grow with a file. Of many recordings
        `batch_size` pieces are read ahead and run together, which is faster. Raises AudioError (a
        ValueError) for audio that cannot be used, or is shorter than one output frame; warns
        (AudioWarning) of a file that holds less than it says.
        """
        given: Any = audio
        one = (
            isinstance(given, str | os.PathLike)
            or hasattr(given, "read")
            or hasattr(given, "__array__")
        )
        if one or not isinstance(given, Iterable):
            return Result(tuple(self.stream(given, sample_rate, channel)))
        recordings = (self.blocks(each, sample_rate, channel) for each in given)
        return (usable(one) for one in transcribe_many(self, recordings, batch_size))

    def stream(
        self, audio: Audio, sample_rate: int = 16000, channel: int | None = None
    ) -> Iterator[Segment]:
        """The segments of a recording, taken as by `transcribe`, each as soon as it is known."""
        return self.spoken(self.readings(self.pieces(self.blocks(audio, sample_rate, channel))))

    def listen(self, chunks: Iterable[npt.ArrayLike], sample_rate: int = 16000) -> Iterator[Event]:
        """What is said in a recording that is being made: see `asr.runtime.live.Event`.

        It comes in chunks (N,) of any length, floats in [-1, 1] or integers, at `sample_rate` Hz.
        """
        from asr.runtime.live import Listener

        listener = Listener(self, sample_rate)
        for chunk in chunks:
            yield from listener.feed(chunk)
        yield from listener.finish()

    def blocks(
        self, audio: Audio, sample_rate: int = 16000, channel: int | None = None
    ) -> Iterator[Array]:
        """A recording as `transcribe` takes it, mono at the model's rate, in blocks (n,)."""
        rate = self.info.features.sample_rate
        total, where = 0, "the waveform"
        if hasattr(audio, "__array__"):
            samples = np.asarray(audio)
            blocks = iter([check_waveform(samples, sample_rate, rate, channel)])
        elif isinstance(audio, str | os.PathLike) or hasattr(audio, "read"):
            where = name_of(audio)
            blocks = read_blocks(audio, rate, channel, incomplete=warn)
        else:
            raise ValueError(
                f"{type(audio).__name__} {audio!r:.40}: not a recording; pass the path of a file, "
                "a binary file or a NumPy array of samples"
            )
        for block in blocks:
            total += len(block)
            yield block
        if total < self.samples_per_frame:
            raise ValueError(
                f"{where}: {total / rate:.3f} s of audio is shorter than one output frame "
                f"({self.samples_per_frame / rate:.2f} s); record more"
            )

    def pieces(self, blocks: Iterable[Array]) -> Iterator[Piece]:
        """The speech in a recording at the model's rate that comes in `blocks` (N,)."""
        rate = self.info.features.sample_rate
        return cut_in_pauses(blocks, rate, self.detector, self.samples_per_frame)

    def readings(self, pieces: Iterable[Piece]) -> Iterator[Reading]:
        """What the network makes of each piece; those that overlap are joined."""
        return self.joined((piece, self.piece_log_probs([piece])[0]) for piece in pieces)

    def joined(self, read: Iterable[tuple[Piece, Array]]) -> Iterator[Reading]:
        """The readings of pieces with their log_probs (T', V); those that overlap are joined."""
        return join(read, self.samples_per_frame, self.info.features.sample_rate)

    def words(self, reading: Reading) -> list[Word]:
        """The words of a reading, in seconds from the beginning of its recording."""
        rate = self.info.features.sample_rate
        seconds = self.samples_per_frame / rate
        ids = self.decoder(reading.log_probs)
        found = read_words(reading.log_probs, ids, self.info.tokens, seconds, self.worded)
        before = reading.start / rate
        return [
            replace(word, start=before + word.start, end=before + word.end)
            for word in settle(found, reading.waveform, rate)
        ]

    def spoken(self, readings: Iterable[Reading]) -> Iterator[Segment]:
        """The segments in readings of one recording that are sure enough."""
        words = (word for reading in readings for word in self.words(reading))
        return (s for s in split_at_pauses(words) if s.confidence >= self.min_confidence)

    def decode(self, log_probs: Array) -> str:
        """The text of log_probs (T', V)."""
        return self.tokenizer.decode(self.decoder(log_probs))

    def waveform_log_probs(self, waveform: Array) -> Array:
        """log_probs (T', V) of a waveform (N,) at the model's rate, its silences included."""
        rate = self.info.features.sample_rate
        pieces = cut_in_pauses([waveform], rate, None, self.samples_per_frame)
        (reading,) = self.readings(pieces)
        return reading.log_probs

    def features(self, waveform: Array) -> Array:
        """Normalised features (T, n_mels) of a piece (N,) at the model's rate, level settled."""
        return log_mel(settle_level(waveform, self.info.features.sample_rate), self.info.features)

    def log_probs(self, features: Sequence[Array]) -> list[Array]:
        """log_probs (T', V) of each of `features` (T, n_mels), run as one padded batch.

        With `one_at_a_time` they are run one by one instead.
        """
        size = 1 if self.one_at_a_time else max(len(features), 1)
        result: list[Array] = []
        for at in range(0, len(features), size):
            group = features[at : at + size]
            lengths = np.array([len(x) for x in group], np.int64)
            batch = np.zeros((len(group), int(lengths.max()), self.info.features.n_mels), "f4")
            for row, x in zip(batch, group, strict=True):
                row[: len(x)] = x
            valid = subsampled_length(lengths, self.info.subsampling_factor)
            outputs = self._backend.run(batch, lengths)
            result += [x[:n] for x, n in zip(outputs, valid, strict=True)]
        return result

    @property
    def samples_per_frame(self) -> int:
        """Samples at the model's rate that one frame of log_probs stands for."""
        return self.info.features.hop_length * self.info.subsampling_factor

    def piece_log_probs(self, pieces: Sequence[Piece]) -> list[Array]:
        """log_probs (T', V) of each piece, as one batch; silence is all blanks, and not in it."""
        heard = [p for p in pieces if np.abs(p.waveform).max() >= SILENCE]
        outputs = iter(self.log_probs([self.features(piece.waveform) for piece in heard]))
        found: list[Array] = []
        for piece in pieces:
            if np.abs(piece.waveform).max() >= SILENCE:
                found.append(next(outputs))
                continue
            frames = n_frames(len(piece.waveform), self.info.features)
            n = subsampled_length(frames, self.info.subsampling_factor)
            found.append(np.full((n, len(self.info.tokens)), -30.0, np.float32))
            found[-1][:, 0] = 0.0
        return found


def usable(result: Result | Exception) -> Result:
    """The result; the exception is raised where there is none."""
    if isinstance(result, Exception):
        raise result
    return result


def warn(problem: str) -> None:
    """Says, as an AudioWarning, what of a recording could not be read."""
    warnings.warn(f"{problem}; the rest is read", AudioWarning, stacklevel=2)


def load(
    path: str | Path | None = None, threads: int = 0,
    beam: BeamConfig | Literal[False] | None = None, min_confidence: float | None = None,
) -> Recognizer:  # fmt: skip
    """Loads an `.onnx` export or a `.pt` checkpoint, else the English model that ships.

    `threads` 0 means all cores; for `beam` and `min_confidence` see `asr.load`. Raises ValueError,
    in one line, for a file that is missing, damaged or of another kind.
    """
    recognizer = Recognizer(open_model(find_model(path), threads))
    if min_confidence is not None:
        if not 0 <= min_confidence <= 1:
            raise ValueError(f"min_confidence {min_confidence} must lie in [0, 1]")
        recognizer.min_confidence = min_confidence
    if beam is None and path is None and (lm := find_language_model()):
        beam = BeamConfig(lm=lm)
    if beam:
        from asr.runtime.language_model import load_decoder

        recognizer.decoder = load_decoder(recognizer.info.tokens, beam)
        recognizer.worded = bool(beam.lm)
    return recognizer
