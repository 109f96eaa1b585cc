"""Utterances to batches: bucketing by length, augmentation, features, padding."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
    augment_waveform,
    spec_augment,
    speed_factor,
    warp_frequency,
)

Key = tuple[int, bool, tuple[int, ...]]  # epoch, SpecAugment on, utterance indices


@dataclass
class Batch:
    """Padded features and targets of B utterances."""

    features: Tensor  # (B, T, n_mels) float32
    feature_lengths: Tensor  # (B,) int64
    targets: Tensor  # (B, S) int64
    target_lengths: Tensor  # (B,) int64
    indices: tuple[int, ...]  # positions in the list of utterances
    seconds: float  # audio in the batch, without padding


class BatchDataset(Dataset[Batch]):
    """Makes whole batches, so that a worker does all the work of one."""

    def __init__(
        self,
        utterances: Sequence[Utterance],
        tokenizer: Tokenizer,
        features: FeatureConfig,
        augment: AugmentConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.utterances = utterances
        self.features = features
        self.augment = augment
        self.seed = seed
        self.targets = [torch.tensor(tokenizer.encode(u.text), dtype=torch.int64)
                        for u in utterances]  # fmt: skip

    def __getitem__(self, key: Key) -> Batch:
        epoch, masks, indices = key
        features = [self._features(i, epoch, masks) for i in indices]
        targets = [self.targets[i] for i in indices]
        width = padded_frames(max(len(f) for f in features))
        return Batch(
            features=torch.stack([torch.from_numpy(pad_frames(f, width)) for f in features]),
            feature_lengths=torch.tensor([len(f) for f in features]),
            targets=torch.nn.utils.rnn.pad_sequence(targets, batch_first=True),
            target_lengths=torch.tensor([len(t) for t in targets]),
            indices=indices,
            seconds=sum(len(f) for f in features) * self.features.hop_length
            / self.features.sample_rate,
        )  # fmt: skip

    def _features(self, index: int, epoch: int, masks: bool) -> np.ndarray:
        """Normalised features (T, n_mels) of one utterance, augmented in training."""
        waveform = read_audio(self.utterances[index].audio_filepath, self.features.sample_rate)
        if self.augment is None:
            return log_mel(waveform, self.features)
        rng = utterance_rng(self.seed, epoch, index)
        speed = speed_factor(rng, self.augment)
        waveform = augment_waveform(waveform, speed, rng, self.augment)
        features = warp_frequency(raw_log_mel(waveform, self.features), rng, self.augment)
        features = normalize(features, self.features)
        return spec_augment(features, rng, self.augment) if masks else features


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
) -> list[tuple[int, ...]]:
    """Groups utterances of like length; at most `batch_size` of them and `batch_seconds` padded.

    An utterance longer than `batch_seconds` is a batch of its own.

    Durations are those after speed perturbation, plus up to 10 % of jitter, so that the same
    utterances do not always meet. Batches come in random order, or the shortest first (`sort`).
    """
    rng = np.random.default_rng((seed, epoch))
    lengths = np.array(durations, dtype=np.float64)
    if augment is not None and augment.speed:
        lengths /= [
            speed_factor(utterance_rng(seed, epoch, i), augment) for i in range(len(lengths))
        ]
    order = np.argsort(lengths * rng.uniform(1.0, 1.0 if sort else 1.1, len(lengths)))
    batches: list[tuple[int, ...]] = []
    group: list[int] = []
    longest = 0.0
    for i in order.tolist():
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
