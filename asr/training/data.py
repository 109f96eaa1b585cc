"""Utterances to batches: bucketing by length, augmentation, features, padding."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from asr.corpus.manifest import Utterance
from asr.runtime.audio import read_audio
from asr.runtime.config import FeatureConfig
from asr.runtime.features import log_mel, n_frames, normalize, raw_log_mel, subsampled_length
from asr.runtime.tokenizer import Tokenizer
from asr.training.augment import (
    AugmentConfig,
    degrade,
    retime,
    spec_augment,
    timing,
    warp_frequency,
)

Front = Callable[[Tensor], Tensor]  # (1, T, n_mels) to hidden frames (1, T / FRONT_RATE, D)
HIDDEN = ".npy"  # ends the name of what a front would make of a recording that there is not
FRONT_RATE = 2  # frames of features that become one of a front's
Key = tuple[int, bool, tuple[int, ...]]  # epoch, SpecAugment on, utterance indices


@dataclass
class Batch:
    """Padded features and targets of B utterances."""

    features: Tensor  # (B, T, n_mels) float32, or what a front made of them
    feature_lengths: Tensor  # (B,) int64
    targets: Tensor  # (B, S) int64
    target_lengths: Tensor  # (B,) int64
    indices: tuple[int, ...]  # positions in the list of utterances
    seconds: float  # audio in the batch, without padding
    hints: list[Tensor] | None = None  # (T, D) each: what a teacher makes of the clean recordings


class BatchDataset(Dataset[Batch]):
    """Makes whole batches, so that a worker does all the work of one.

    If a `front` of the network is set, batches hold what it makes of the features, at half their
    rate; every utterance's is kept on disk in `cache`.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        tokenizer: Tokenizer,
        features: FeatureConfig,
        augment: AugmentConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.teacher: Callable[[np.ndarray], np.ndarray] | None = None
        self.front: Front | None = None
        self.cache = Path()
        self.utterances = utterances
        self.voices = [u.audio_filepath for u in utterances if not is_hidden(u)]
        self.features = features
        self.augment = augment
        self.seed = seed
        self.targets = [torch.tensor(tokenizer.encode(u.text), dtype=torch.int64)
                        for u in utterances]  # fmt: skip

    def begin_behind(self, front: Front | None, cache: Path) -> None:
        """Batches hold what a front makes of the features (kept in `cache`), or the features."""
        self.front, self.cache = front, cache
        if front:
            cache.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, key: Key) -> Batch:
        epoch, masks, indices = key
        rate = FRONT_RATE if self.front else 1
        features = [self._features(i, epoch, masks) for i in indices]
        targets = [self.targets[i] for i in indices]
        hints = [torch.from_numpy(self._hint(i, epoch)) for i in indices] if self.teacher else None
        lengths = [rate * len(f) for f in features]
        width = padded_frames(max(lengths)) // rate
        return Batch(
            features=torch.stack([torch.from_numpy(pad_frames(f, width)) for f in features]),
            feature_lengths=torch.tensor(lengths),
            targets=torch.nn.utils.rnn.pad_sequence(targets, batch_first=True),
            target_lengths=torch.tensor([len(t) for t in targets]),
            indices=indices,
            seconds=sum(lengths) * self.features.hop_length
            / self.features.sample_rate,
            hints=hints,
        )  # fmt: skip

    def _features(self, index: int, epoch: int, masks: bool) -> np.ndarray:
        """What the network is given of one utterance: features (T, n_mels), or the front's."""
        if is_hidden(self.utterances[index]):
            return np.load(self.utterances[index].audio_filepath).astype(np.float32)
        if self.front is None:
            return self._log_mel(index, epoch, masks)
        path = self.cache / f"{index}.npy"
        if not path.exists():
            hidden = self.front(torch.from_numpy(self._log_mel(index, epoch, masks))[None])[0]
            temporary = path.with_suffix(f".{os.getpid()}.npy")
            np.save(temporary, hidden.numpy().astype(np.float16))
            temporary.replace(path)
        return np.load(path).astype(np.float32)

    def _log_mel(self, index: int, epoch: int, masks: bool) -> np.ndarray:
        """Normalised features (T, n_mels), augmented in training."""
        waveform, rng = self._clean(index, epoch)
        if self.augment is None:
            return log_mel(waveform, self.features)
        waveform = degrade(waveform, rng, self.augment, self._voices)
        features = warp_frequency(raw_log_mel(waveform, self.features), rng, self.augment)
        features = normalize(features, self.features)
        return spec_augment(features, rng, self.augment) if masks else features

    def _clean(self, index: int, epoch: int) -> tuple[np.ndarray, np.random.Generator]:
        """The recording at its speed and between its silences, and what draws the rest."""
        waveform = read_audio(self.utterances[index].audio_filepath, self.features.sample_rate)
        rng = utterance_rng(self.seed, epoch, index)
        if self.augment is not None:
            waveform = retime(waveform, timing(rng, self.augment), rng, self.augment.shift)
        return waveform, rng

    def _hint(self, index: int, epoch: int) -> np.ndarray:
        """What the teacher makes of the same recording, before anything degrades it."""
        assert self.teacher is not None
        return self.teacher(self._clean(index, epoch)[0])

    def _voices(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Three to five other recordings, for babble."""
        chosen = rng.integers(0, len(self.voices), int(rng.integers(3, 6)))
        return [read_audio(self.voices[i], self.features.sample_rate) for i in chosen]


def is_hidden(utterance: Utterance) -> bool:
    """Whether the frames of a front stand in the place of a recording."""
    return utterance.audio_filepath.endswith(HIDDEN)


def padded_frames(n: int) -> int:
    """The next of a row of lengths that grow by 8 %: batches come in few shapes.

    A processor compiles its kernels for every shape anew, which costs a quarter of the time and
    gigabytes of memory where every batch has another one; padding costs 4 %.
    """
    size = 64
    while size < n:
        size = max(size + 16, -(-int(size * 1.08) // 8) * 8)
    return size


def pad_frames(features: np.ndarray, width: int) -> np.ndarray:
    """(T, n_mels) with zeros up to (width, n_mels)."""
    return np.pad(features, ((0, width - len(features)), (0, 0)))


def utterance_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The source of all random choices about one utterance in one epoch."""
    return np.random.default_rng((seed, epoch, index))


def epoch_batches(
    durations: Sequence[float],
    epoch: int,
    batch_size: int,
    batch_seconds: float,
    seed: int = 0,
    sort: bool = False,
    augment: AugmentConfig | None = None,
    chosen: Sequence[int] | None = None,
    version: int | None = None,
) -> list[tuple[int, ...]]:
    """Groups utterances of like length; at most `batch_size` of them and `batch_seconds` padded.

    An utterance longer than `batch_seconds` is a batch of its own. `chosen`: only these, or some
    of them more than once. `version`: the epoch whose augmentation they have, if not this one.

    Durations are those after speed perturbation, plus up to 10 % of jitter, so that the same
    utterances do not always meet. Batches come in random order, or the shortest first (`sort`).
    """
    rng = np.random.default_rng((seed, epoch))
    version = epoch if version is None else version
    lengths = np.array(durations, dtype=np.float64)
    if augment is not None:
        times = (timing(utterance_rng(seed, version, i), augment) for i in range(len(lengths)))
        lengths = np.array([t.duration(x) for t, x in zip(times, durations, strict=True)])
    part = np.arange(len(lengths)) if chosen is None else np.array(chosen)
    part = part[np.argsort(lengths[part] * rng.uniform(1.0, 1.0 if sort else 1.1, len(part)))]
    batches: list[tuple[int, ...]] = []
    group: list[int] = []
    longest = 0.0
    for i in part.tolist():
        size = padded_frames(int(lengths[i] * 100) + 1) / 100  # seconds; a frame is 10 ms
        widest = max(longest, size)
        if group and (len(group) == batch_size or widest * (len(group) + 1) > batch_seconds):
            batches.append(tuple(group))
            group, widest = [], size
        group.append(i)
        longest = widest
    if group:
        batches.append(tuple(group))
    if not sort:
        rng.shuffle(batches)
    return batches


def draw_corpora(
    corpora: Sequence[str], weights: Mapping[str, float], epoch: int, seed: int = 0
) -> list[int]:
    """The utterances of an epoch: of every corpus its weight (1 by default) times its size.

    A corpus of weight 0.5 is gone through once in two epochs, in random order.
    """
    chosen: list[int] = []
    for number, name in enumerate(sorted(set(corpora))):
        own = np.array([i for i, corpus in enumerate(corpora) if corpus == name])
        count = round(weights.get(name, 1.0) * len(own))
        place = np.arange(epoch * count, (epoch + 1) * count)
        for turn in np.unique(place // len(own)):
            order = np.random.default_rng((seed, number, int(turn))).permutation(own)
            chosen += order[place[place // len(own) == turn] % len(own)].tolist()
    return chosen


def make_loader(
    dataset: BatchDataset, keys: Sequence[Key], num_workers: int = 0, pin_memory: bool = False
) -> DataLoader[Batch]:
    """Yields the batches named by `keys`, in that order whatever the number of workers."""
    warnings.filterwarnings("ignore", "This DataLoader will create")  # workers mostly wait on disks
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=keys,
        num_workers=min(num_workers, len(keys)),
        prefetch_factor=4 if num_workers and keys else None,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread,
        generator=torch.Generator().manual_seed(0),  # takes nothing from the global generator
    )


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def drop_impossible(
    utterances: Sequence[Utterance],
    tokenizer: Tokenizer,
    features: FeatureConfig,
    subsampling_factor: int,
    fastest: float = 1.0,
) -> tuple[list[Utterance], list[Utterance]]:
    """Parts utterances into those that CTC can align and those whose target exceeds the frames.

    CTC needs a frame a token and one more between equal neighbours, also when played `fastest`.
    """
    possible: list[Utterance] = []
    impossible: list[Utterance] = []
    for utterance in utterances:
        ids = tokenizer.encode(utterance.text)
        needed = len(ids) + sum(a == b for a, b in pairwise(ids))
        samples = int(utterance.duration * features.sample_rate / fastest)
        available = subsampled_length(n_frames(samples, features), subsampling_factor)
        (possible if 0 < needed <= available else impossible).append(utterance)
    return possible, impossible


def plain_batches(
    utterances: Sequence[Utterance], batch_size: int, batch_seconds: float = 1e9
) -> Iterator[Key]:
    """Keys for evaluation: no augmentation, longest first so that memory trouble shows at once."""
    durations = [u.duration for u in utterances]
    for group in reversed(epoch_batches(durations, 0, batch_size, batch_seconds, sort=True)):
        yield (0, False, group)
