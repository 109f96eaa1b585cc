"""The training data in epochs: which batches, in which order, and as many as make a step."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import cycle, islice

from asr.training.data import Batch, BatchDataset, Key, draw_corpora, epoch_batches, make_loader
from asr.training.train_config import TrainConfig


def full_names(weights: Mapping[str, float], corpora: Collection[str]) -> dict[str, float]:
    """Corpus weights by the names of manifests; ValueError for one that is not there."""
    full: dict[str, float] = {}
    for name, weight in weights.items():
        match = {name, f"train-{name}", f"train_{name}"} & set(corpora)
        if not match:
            there = ", ".join(sorted(set(corpora)))
            raise ValueError(f"--corpus_weights: no corpus {name!r}; there are {there}")
        full |= dict.fromkeys(match, weight)
    return full


class Epochs:
    """What process `rank` of `world` hears of the training data.

    `wait_seconds` is how long the loader of the last epoch has kept its reader waiting.
    """

    def __init__(
        self, train_set: BatchDataset, config: TrainConfig, rank: int = 0, world: int = 1,
        pin_memory: bool = False,
    ) -> None:  # fmt: skip
        self.train_set, self.config, self.pin_memory = train_set, config, pin_memory
        self.rank, self.world = rank, world
        self.corpora = [u.corpus for u in train_set.utterances]
        self.weights = full_names(config.weights(), self.corpora)
        self.wait_seconds = 0.0

    def frozen(self, epoch: int) -> bool:
        """Whether the front keeps its weights in an epoch."""
        return bool(self.config.freeze_blocks) and epoch < self.config.freeze_epochs

    def keys(self, epoch: int) -> list[Key]:
        """This process's batches of an epoch (from 0); every process has the same number."""
        config, frozen = self.config, self.frozen(epoch)
        version = 0 if frozen else epoch  # a frozen front hears every utterance in one version
        batches = epoch_batches(
            [u.duration for u in self.train_set.utterances], epoch, config.batch_size,
            config.batch_seconds, config.seed, epoch < config.sorted_epochs, config.augment,
            draw_corpora(self.corpora, self.weights, epoch, config.seed), version,
        )  # fmt: skip
        batches += list(islice(cycle(batches), -len(batches) % self.world))
        masks = epoch >= config.specaugment_start * config.epochs and not frozen
        return [(version, masks, batch) for batch in batches[self.rank :: self.world]]

    def steps(self, keys: Sequence[Key]) -> Iterator[list[Batch]]:
        """The batches of `keys`, `accumulate` at a time."""
        self.wait_seconds = 0.0
        loader = iter(make_loader(self.train_set, keys, self.config.num_workers, self.pin_memory))
        while True:
            start = time.perf_counter()
            group = list(islice(loader, self.config.accumulate))
            self.wait_seconds += time.perf_counter() - start
            if not group:
                return
            yield group
