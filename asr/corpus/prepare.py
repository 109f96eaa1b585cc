"""Preparing data: every utterance of a split is kept or left out for a stated reason.

The checks are those that training would stumble over: audio that is missing, damaged, too short or
too long, and text that is missing, empty, outside the alphabet or longer than the frames allow.
"""

from __future__ import annotations

import io
import math
import os
import re
import wave
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from asr.corpus import layouts
from asr.corpus.english import spoken
from asr.corpus.librispeech import scan_librispeech
from asr.corpus.manifest import (
    ManifestError,
    Utterance,
    normalise,
    read_manifest,
    tidy,
    write_manifest,
)
from asr.corpus.splits import find_sources
from asr.runtime.audio import SAMPLE_RATE, Waveform, audio_duration, read_audio
from asr.runtime.config import FeatureConfig
from asr.runtime.features import n_frames, subsampled_length
from asr.runtime.files import write_atomically
from asr.runtime.sources import AudioError
from asr.runtime.tokenizer import ENGLISH, SPACE, Tokenizer

OUTSIDE = "characters outside the alphabet"

Track = Callable[[Iterable["Utterance | LeftOut"], int], Iterable["Utterance | LeftOut"]]


@dataclass(frozen=True)
class Rules:
    """What is kept; durations in seconds.

    With the `tokenizer` of a model that is to be trained further, its letters count in place of the
    alphabet, and texts keep their capitals if it writes them.
    """

    alphabet: str = ENGLISH
    min_duration: float = 0.1
    max_duration: float = 35.0
    subsampling_factor: int = 4
    normalize_text: str = ""  # "en": numbers, abbreviations and signs as English words
    decode: bool = False  # read all samples, so that damage behind the header is found
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        if self.normalize_text not in ("", "en"):
            raise ValueError(f"normalize_text {self.normalize_text!r} is not en, the only language")
        if not self.alphabet.strip():
            raise ValueError("the alphabet is empty; give its letters, such as --alphabet abc")
        if not 0 <= self.min_duration < self.max_duration:
            raise ValueError(
                f"min_duration {self.min_duration} must be below max_duration {self.max_duration}"
            )
        if self.subsampling_factor not in (2, 4, 8):
            raise ValueError(f"subsampling_factor {self.subsampling_factor} is not 2, 4 or 8")
        if self.tokenizer is not None:
            self.tokenizer.encode("")  # a ValueError for tokens that no text can be cut into

    @property
    def letters(self) -> set[str]:
        """What texts may consist of besides the space."""
        if self.tokenizer is None:
            return set(self.alphabet)
        return set("".join(t for t in self.tokenizer.tokens if t[0] != "<")) - {SPACE}

    def written(self, text: str) -> str:
        """A text as it is learned."""
        if self.normalize_text:
            return spoken(normalise(text))
        return tidy(text) if self.tokenizer and self.tokenizer.formatted else normalise(text)

    def symbols(self, text: str) -> Sequence[Any]:
        """The tokens of a text, one or more output frames each; ValueError if there are none."""
        return text if self.tokenizer is None else self.tokenizer.encode(text)


@dataclass(frozen=True)
class LeftOut:
    """An utterance that is not used, and why."""

    id: str
    reason: str
    detail: str
    audio_filepath: str
    text: str


@dataclass
class Prepared:
    """A split after the checks; `corrected` counts durations that a manifest had wrong."""

    name: str
    utterances: list[Utterance] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    corrected: int = 0


def corpora_at(path: Path) -> dict[str, Path]:
    """The splits at a path by name: those of `find_sources`, or a corpus of another layout."""
    if layouts.reader_of(path):
        return {path.stem if path.is_file() else path.absolute().name: path}
    return find_sources(path)


def name_sources(paths: Sequence[str | Path]) -> dict[str, Path]:
    """The splits at all `paths` by name; equal names get their parent folder's name behind."""
    found = [item for path in paths for item in corpora_at(Path(path)).items()]
    counts = Counter(name for name, _ in found)
    named: dict[str, Path] = {}
    for name, path in found:
        if counts[name] > 1:
            name = f"{name}-{path.absolute().parent.name}"
        if name in named:
            raise ManifestError(f"{path}: a second split named {name}; prepare them one by one")
        named[name] = path
    return named


def prepare(
    name: str,
    source: str | Path,
    rules: Rules | None = None,
    wav_dir: str | Path | None = None,
    num_workers: int = 4,
    track: Track | None = None,
) -> Prepared:
    """Check one manifest or LibriSpeech split folder; with `wav_dir`, copy what is kept as WAV.

    `track(results, count)` may wrap the results as they come (a progress bar).
    """
    rules = rules or Rules()
    entries = list(_entries(Path(source), rules))
    if not entries:
        raise ManifestError(f"{source}: no utterances in it; check the path")
    targets = _wav_paths(entries, Path(wav_dir)) if wav_dir else [None] * len(entries)
    check = partial(_check, rules=rules)
    prepared = Prepared(name)
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            results: Iterable[Utterance | LeftOut] = pool.map(check, entries, targets)
            if track:
                results = track(results, len(entries))
            for entry, result in zip(entries, results, strict=True):
                if isinstance(result, LeftOut):
                    prepared.left_out.append(result)
                    continue
                prepared.utterances.append(result)
                stated = entry.utterance.duration
                prepared.corrected += bool(stated) and abs(stated - result.duration) > 0.1
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if not prepared.utterances:
        reasons = _reasons(prepared.left_out).items()
        why = ", ".join(f"{count} {reason}{note}" for reason, (count, note) in reasons)
        raise ManifestError(f"{source}: nothing is left of {len(entries)} utterances: {why}")
    return prepared


def write_prepared(prepared: Prepared, output_dir: str | Path) -> Path:
    """Write `<name>.json` and `<name>.left_out.tsv` to `output_dir`; returns the manifest."""
    manifest = Path(output_dir) / f"{prepared.name}.json"
    rows = [("id", "reason", "detail", "audio_filepath", "text")]
    rows += [(x.id, x.reason, x.detail, x.audio_filepath, x.text) for x in prepared.left_out]
    lines = ["\t".join(" ".join(value.split()) for value in row) + "\n" for row in rows]
    write_atomically(manifest.with_suffix(".left_out.tsv"), "".join(lines))
    write_manifest(manifest, prepared.utterances, relative_to=output_dir)
    return manifest


def summary(prepared: Prepared) -> str:
    """Hours, speakers, two histograms, and what was left out, as text."""
    utterances = prepared.utterances
    durations = np.array([u.duration for u in utterances])
    rates = np.array([len(u.text) for u in utterances]) / durations
    speakers = {u.speaker for u in utterances} - {""}
    lines = [
        f"{prepared.name}: {len(utterances):,} utterances, {durations.sum() / 3600:.2f} h, "
        f"{len(speakers) or 'unknown'} speakers",
        *histogram("seconds", durations),
        *histogram("characters a second", rates),
    ]
    if prepared.corrected:
        lines.append(f"  {prepared.corrected:,} durations corrected by the audio")
    lines.append(f"  left out: {len(prepared.left_out):,}")
    for reason, (count, note) in _reasons(prepared.left_out).items():
        examples = [x for x in prepared.left_out if x.reason == reason][:3]
        shown = "; ".join(f"{x.id} ({x.detail})" if x.detail else x.id for x in examples)
        lines.append(f"    {count:,} {reason}{note}: {shown}{'; …' if count > 3 else ''}")
    return "\n".join(lines)


def histogram(title: str, values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> list[str]:
    """About ten round bins with bars of `#`; empty ends are not shown."""
    low, high = float(values.min()), float(values.max())
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-9, high / 100)))
    while (high - low) / step > 10:
        step *= 2
    if (high - low) / step < 5:
        step /= 2
    edges = np.arange(math.floor(low / step), math.floor(high / step) + 2) * step
    counts, _ = np.histogram(values, edges)
    lines = [f"  {title}: mean {values.mean():.1f}, median {np.median(values):.1f}"]
    for start, end, count in zip(edges, edges[1:], counts, strict=False):
        bar = "#" * math.ceil(40 * count / counts.max())
        lines.append(f"    {start:6g} – {end:<6g} {count:7,} {bar}")
    return lines


def needed_frames(symbols: Sequence[Any]) -> int:
    """Output frames that CTC needs for characters or tokens: one each, and one between equals."""
    return len(symbols) + sum(a == b for a, b in pairwise(symbols))


def output_frames(duration: float, subsampling_factor: int = 4) -> int:
    """Output frames of the encoder for a recording of `duration` seconds."""
    frames = n_frames(round(duration * SAMPLE_RATE), FeatureConfig())
    n: int = subsampled_length(frames, subsampling_factor)
    return n


@dataclass(frozen=True)
class _Entry:
    utterance: Utterance  # duration 0 where it is not known yet
    has_text: bool = True


def _entries(source: Path, rules: Rules) -> Iterator[_Entry]:
    reader = layouts.reader_of(source)
    if reader is None and not source.is_dir():
        for u in read_manifest(source, measured=False):
            yield _Entry(replace(u, text=rules.written(u.written)))
        return
    found: Iterable[layouts.Found] = reader(source) if reader else librispeech(source)
    for audio, text, speaker, id in found:
        path = os.path.abspath(audio) if audio else ""
        said = rules.written(text or "")
        yield _Entry(Utterance(path, 0.0, said, speaker, id), text is not None)


def librispeech(source: Path) -> Iterator[layouts.Found]:
    """A split folder of LibriSpeech in the form of the other layouts."""
    for id, speaker, audio, text in scan_librispeech(source):
        yield layouts.Found(audio, text, speaker, id)


def _check(entry: _Entry, target: Path | None, rules: Rules) -> Utterance | LeftOut:
    """The utterance with its true duration (and its copy's path), or why it is left out."""
    u = entry.utterance

    def out(reason: str, detail: str = "") -> LeftOut:
        return LeftOut(u.id, reason, detail, u.audio_filepath, u.text)

    if not u.audio_filepath or not os.path.exists(u.audio_filepath):
        return out("missing audio")
    if not entry.has_text:
        return out("no transcript")
    if not u.text:
        return out("empty text")
    if unknown := sorted(set(u.text) - rules.letters - {" "}):
        return out(OUTSIDE, " ".join(unknown))
    try:
        symbols = rules.symbols(u.text)
    except ValueError:  # letters that stand in no piece of their own
        return out(OUTSIDE)
    try:
        duration = audio_duration(u.audio_filepath)
        waveform = read_audio(u.audio_filepath) if rules.decode or target else None
    except AudioError as error:
        return out("unreadable audio", str(error).removeprefix(f"{u.audio_filepath}: "))
    if waveform is not None:
        duration = len(waveform) / SAMPLE_RATE
    if not rules.min_duration <= duration <= rules.max_duration:
        return out("duration out of range", f"{duration:.2f} s")
    frames, needed = output_frames(duration, rules.subsampling_factor), needed_frames(symbols)
    if needed > frames:
        return out("text longer than the frames", f"{needed} needed, {frames} there")
    if target and waveform is not None:
        _write_wav(target, waveform)
        return Utterance(str(target), duration, u.text, u.speaker, u.id)
    return Utterance(u.audio_filepath, duration, u.text, u.speaker, u.id)


def _wav_paths(entries: list[_Entry], folder: Path) -> list[Path | None]:
    """SPEAKER/ID.wav, made of harmless characters and all different."""
    paths: list[Path | None] = []
    used: set[str] = set()
    for entry in entries:
        parts = [entry.utterance.speaker or "unknown", entry.utterance.id]
        name = "/".join(re.sub(r"^\.+|[^\w.-]", "_", part) for part in parts)
        unique, number = name, 2
        while unique.lower() in used:
            unique, number = f"{name}-{number}", number + 1
        used.add(unique.lower())
        paths.append(folder.absolute() / f"{unique}.wav")
    return paths


def _write_wav(path: Path, waveform: Waveform) -> None:
    """Write 16-bit mono WAV, atomically; 16-bit sources come back bit for bit."""
    samples = np.clip(np.rint(waveform * 32768), -32768, 32767).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _reasons(left_out: list[LeftOut]) -> dict[str, tuple[int, str]]:
    """How often each reason occurs, most frequent first, and all characters that were outside."""
    reasons = {}
    for reason, count in Counter(x.reason for x in left_out).most_common():
        characters = {
            c for x in left_out if x.reason == reason == OUTSIDE for c in x.detail.split()
        }
        reasons[reason] = (count, f" [{' '.join(sorted(characters))}]" if characters else "")
    return reasons
