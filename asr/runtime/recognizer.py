"""Speech to text with one model file: `load(path).transcribe(...)` for `.onnx` and `.pt`.

An `.onnx` file needs NumPy, onnxruntime and soundfile only; torch is imported for a `.pt`. Audio is
cut in pauses into segments of at most 25 seconds (see `pieces`), so the memory of the network
does not grow with the recording.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

import numpy as np
import numpy.typing as npt

from asr.runtime.audio import Source, check_waveform, read_blocks
from asr.runtime.batches import transcribe_many
from asr.runtime.beam import BeamConfig
from asr.runtime.config import FeatureConfig, config_from_dict
from asr.runtime.decoding import greedy_decode
from asr.runtime.features import log_mel, n_frames, subsampled_length
from asr.runtime.foreign import ForeignModel
from asr.runtime.level import settle_level
from asr.runtime.pauses import settle
from asr.runtime.pieces import Piece, cut_in_pauses
from asr.runtime.result import Result, Segment, split_at_pauses
from asr.runtime.shipped import find_model
from asr.runtime.sources import AudioWarning, name_of
from asr.runtime.tokenizer import Tokenizer
from asr.runtime.vad import Detector, find_speech
from asr.runtime.words import Word, read_words

if TYPE_CHECKING:
    from asr.runtime.live import Event

Array = npt.NDArray[np.float32]
Audio = Source | npt.NDArray[Any]  # a recording

METADATA_KEY = "asr"  # the ONNX metadata entry with all that `info` needs, as JSON
METADATA_VERSION = 1
OLDEST = [1, 20]  # onnxruntime that runs what the export writes, as in pyproject.toml
MIN_CONFIDENCE = 0.2  # of a segment; what is heard in music and noise is less sure
SILENCE = 2.0**-14  # what stays below this (-84 dBFS), two steps of 16 bits, holds no speech
LONGEST = 300.0  # seconds of overlapping pieces that are joined: memory has an end


@dataclass(frozen=True)
class Info:
    """What a model file says about itself."""

    parameters: int  # 0 where the file does not say
    tokens: list[str]
    features: FeatureConfig
    subsampling_factor: int
    one_at_a_time: bool  # batch mates would change the result (dynamically quantised activations)
    history: tuple[dict[str, Any], ...] = ()  # of a checkpoint: how it was trained and compressed


@dataclass(frozen=True)
class Reading:
    """A stretch of a recording and what the network makes of it."""

    start: int  # the place of its first sample in the recording
    waveform: Array  # (N,)
    log_probs: Array  # (T', V)

    def until(self, frame: int, unit: int) -> Reading:
        """Its first frames, of `unit` samples each."""
        return Reading(self.start, self.waveform[: frame * unit], self.log_probs[:frame])

    def after(self, frame: int, unit: int) -> Reading:
        """What is left of it behind its first frames."""
        place = self.start + frame * unit
        return Reading(place, self.waveform[frame * unit :], self.log_probs[frame:])

    def joined_to(self, right: Reading) -> Reading:
        """Both, the right one following."""
        return Reading(
            self.start,
            np.concatenate([self.waveform, right.waveform]),
            np.concatenate([self.log_probs, right.log_probs]),
        )


class Backend(Protocol):
    """Something that runs the network; `info` describes its file."""

    info: Info

    def run(self, features: Array, lengths: npt.NDArray[np.int64]) -> Array:
        """features (B, T, n_mels), lengths (B,) in frames -> log_probs (B, T', V)."""


class Recognizer:
    """Audio to text; made by `load`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.info = backend.info
        self.one_at_a_time = self.info.one_at_a_time
        self.tokenizer = Tokenizer(self.info.tokens)
        self.detector: Detector | None = find_speech  # None: all of a recording is read
        self.decoder: Callable[[Array], list[int]] = greedy_decode
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
        unit = self.samples_per_frame
        joined: Reading | None = None
        for piece, log_probs in read:
            right = Reading(piece.start, piece.waveform, log_probs)
            if joined is not None and piece.overlap:
                first = (piece.start - joined.start) // unit
                shared = len(joined.log_probs) - first
                cut = meeting_frame(joined.log_probs[first:], right.log_probs[:shared])
                joined, right = joined.until(first + cut, unit), right.after(cut, unit)
                if len(joined.waveform) < LONGEST * self.info.features.sample_rate:
                    joined = joined.joined_to(right)
                    continue
            if joined is not None:
                yield joined
            joined = right
        if joined is not None:
            yield joined

    def words(self, reading: Reading) -> list[Word]:
        """The words of a reading, in seconds from the beginning of its recording."""
        rate = self.info.features.sample_rate
        seconds = self.samples_per_frame / rate
        ids = self.decoder(reading.log_probs)
        found = read_words(reading.log_probs, ids, self.info.tokens, seconds)
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


def meeting_frame(left: Array, right: Array) -> int:
    """Where to change from `left` to `right`, two readings (n, V) of the same frames.

    The middle of the longest run of frames at which both read a blank, so that no token is lost or
    said twice; of equal ones the nearest to the middle, which it is too where there is none.
    """
    middle = len(left) // 2
    blank = (left.argmax(axis=1) == 0) & (right.argmax(axis=1) == 0)
    runs = np.flatnonzero(np.diff(blank, prepend=False, append=False)).reshape(-1, 2)
    centres = (runs[:, 0] + runs[:, 1]) // 2
    ranks = [(b - a, -abs(c - middle), c) for (a, b), c in zip(runs, centres, strict=True)]
    return int(max(ranks)[2]) if ranks else middle


def load(
    path: str | Path | None = None, threads: int = 0, beam: BeamConfig | None = None,
    min_confidence: float | None = None,
) -> Recognizer:  # fmt: skip
    """Loads an `.onnx` export or a `.pt` checkpoint, else the English model that ships.

    `threads` 0 means all cores. With `beam` it decodes by beam search, else greedily; for
    `min_confidence` see `asr.load`. Raises ValueError, in one line, for a file that is missing,
    damaged or of another kind.
    """
    recognizer = _load(find_model(path), threads)
    if min_confidence is not None:
        if not 0 <= min_confidence <= 1:
            raise ValueError(f"min_confidence {min_confidence} must lie in [0, 1]")
        recognizer.min_confidence = min_confidence
    if beam is not None:
        from asr.runtime.language_model import load_decoder

        recognizer.decoder = load_decoder(recognizer.info.tokens, beam)
    return recognizer


def _load(path: Path, threads: int) -> Recognizer:
    if not path.exists():
        raise ValueError(f"{path}: no such model; name an .onnx or .pt file")
    if path.is_dir():
        raise ValueError(f"{path}: a folder; name the model in it, e.g. {path / 'model.onnx'}")
    if path.suffix == ".onnx":
        return Recognizer(OnnxBackend(path, threads))
    if path.suffix == ".pt":
        return Recognizer(TorchBackend(path, threads))
    raise ValueError(f"{path}: expected a model that ends in .onnx or .pt")


class OnnxBackend:
    """An exported model in onnxruntime: ours, or one of NeMo's (see `asr.runtime.foreign`)."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors share no class of their own
            raise ValueError(f"{path}: {explain(str(error), onnxruntime.__version__)}") from None
        metadata = dict(self._session.get_modelmeta().custom_metadata_map)
        self._columns: npt.NDArray[np.intp] | None = None
        if METADATA_KEY in metadata:
            self.info = read_info(path, metadata)
            return
        try:
            foreign = ForeignModel(path, self._session)
        except ValueError:
            raise
        except Exception as error:  # onnxruntime's own
            raise ValueError(
                f"{path}: does not run: {' '.join(str(error).split())[:160]}"
            ) from None
        self._columns = foreign.columns
        factor = foreign.subsampling_factor
        self.info = Info(0, foreign.tokens, foreign.features, factor, one_at_a_time=True)

    def run(self, features: Array, lengths: npt.NDArray[np.int64]) -> Array:
        inputs = {"audio_signal": np.ascontiguousarray(features.transpose(0, 2, 1))}
        outputs: list[Any] = self._session.run(["logprobs"], {**inputs, "length": lengths})
        log_probs: Array = outputs[0]
        return log_probs if self._columns is None else log_probs[..., self._columns]


def explain(error: str, version: str) -> str:
    """Why onnxruntime of a `version` cannot load a file, from its error, and what to do."""
    reason = " ".join(error.split())
    newer = re.search(
        r"Unsupported model IR version: \d+|support for domain \S+ is till opset \d+|"
        r"\S+ is not a registered function/op|No Op registered for \S+",
        reason,
    )
    if newer is None:
        return f"not a usable ONNX file, truncated or damaged; export it again ({reason[:160]})"
    if [int(part) for part in version.split(".")[:2]] < OLDEST:
        needed = f"needs onnxruntime {OLDEST[0]}.{OLDEST[1]} or newer, {version} is installed"
    else:
        needed = f"needs a newer onnxruntime than {version}, which is installed"
    return f"{needed}; pip install --upgrade onnxruntime ({newer[0]})"


def read_info(path: Path, metadata: dict[str, str]) -> Info:
    """The description that our export wrote into an ONNX file; ValueError if it is damaged."""
    try:
        values = json.loads(metadata[METADATA_KEY])
        version = values["version"]
        if version > METADATA_VERSION:
            raise ValueError(
                f"written by a newer version (format {version}, this program reads up to "
                f"{METADATA_VERSION}); update the program"
            )
        return Info(
            parameters=int(values["parameters"]),
            tokens=[str(token) for token in values["tokens"]],
            features=config_from_dict(FeatureConfig, values["features"]),
            subsampling_factor=int(values["subsampling_factor"]),
            one_at_a_time=bool(values["one_at_a_time"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: unusable metadata: {error}") from None


class TorchBackend:
    """A checkpoint in torch; `threads` sets torch's number for the whole process."""

    def __init__(self, path: Path, threads: int) -> None:
        try:
            import torch
        except ModuleNotFoundError:
            raise ValueError(
                f"{path}: needs PyTorch, which is not installed here; export it to .onnx with "
                "scripts/export_onnx.py on the computer that trained it, or pip install torch"
            ) from None

        from asr.network.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(path)
        if threads:
            torch.set_num_threads(threads)
        self._model = checkpoint.model
        self.info = Info(
            parameters=count_weights(self._model),
            tokens=checkpoint.tokenizer.tokens,
            features=checkpoint.features,
            subsampling_factor=self._model.config.total_factor,
            one_at_a_time=any(getattr(m, "one_at_a_time", False) for m in self._model.modules()),
            history=tuple(checkpoint.history),
        )

    def run(self, features: Array, lengths: npt.NDArray[np.int64]) -> Array:
        import torch

        with torch.inference_mode():
            output = self._model(torch.from_numpy(features), torch.from_numpy(lengths))
        log_probs: Array = output.log_probs.numpy()
        return log_probs


def count_weights(model: Any) -> int:
    """Weights and biases of a torch model; a packed layer counts the weights it stands for."""
    tensors = [x for n, x in model.named_buffers() if n.endswith(("qweight", "indices"))]
    return sum(int(x.numel()) for x in (*model.parameters(), *tensors))
