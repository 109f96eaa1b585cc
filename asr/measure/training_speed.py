"""Speed of training, as scripts/benchmark.py reports it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
import torch

from asr.corpus.manifest import Utterance
from asr.network.checkpoint import Checkpoint
from asr.network.model import ConformerCTC, count_parameters
from asr.runtime.config import preset
from asr.runtime.tokenizer import Tokenizer
from asr.training.data import Key, make_loader
from asr.training.train_config import TrainConfig
from asr.training.trainer import Trainer

AHEAD = 4  # batches that a worker of asr.training.data.make_loader keeps ready


def train_speed(
    utterances: Sequence[Utterance], preset_name: str, config: TrainConfig, steps: int, warmup: int
) -> dict[str, Any]:
    """Seconds of audio trained per second, by the real loader and the real step.

    `audio_per_second` is the median over steps, waiting for data included, `overall` the whole
    audio over the whole time; `loader_share` is the share of the time spent waiting for data, and
    `loader_alone` the seconds of audio per second that the loader makes when nobody trains.
    """
    torch.manual_seed(config.seed)
    tokenizer = Tokenizer.characters_of(u.text for u in utterances)
    model = ConformerCTC(preset(preset_name, vocab_size=len(tokenizer)))
    parameters = count_parameters(model)
    trainer = Trainer(Checkpoint(model, tokenizer), config, utterances, [], "unused")
    cuda = trainer.learner.device.type == "cuda"
    # more batches than are trained, so that the workers are busy until the last step
    needed = (warmup + steps) * config.accumulate + AHEAD * config.num_workers + 1
    keys = list(islice(endless_keys(trainer), needed))
    batches = trainer.epochs.steps(keys)
    rows: list[tuple[float, float, float]] = []  # seconds of audio, waiting, in all
    for number in range(warmup + steps):
        trainer.epochs.wait_seconds, start = 0.0, time.perf_counter()
        group = next(batches)
        trainer.train_step(group, progress=number / (warmup + steps))
        if cuda:
            torch.cuda.synchronize(trainer.learner.device)
        if number >= warmup:
            audio = sum(batch.seconds for batch in group)
            rows.append((audio, trainer.epochs.wait_seconds, time.perf_counter() - start))
    del batches
    audio_seconds, waiting, taken = np.array(rows).T
    return {
        "preset": preset_name,
        "parameters": parameters,
        "precision": trainer.learner.precision,
        "device": trainer.learner.device.type,
        "batch_size": config.batch_size,
        "batch_seconds": config.batch_seconds,
        "steps": steps,
        "audio_per_second": float(np.median(audio_seconds / taken)),
        "overall": float(audio_seconds.sum() / taken.sum()),
        "step_seconds": float(np.median(taken)),
        "audio_per_step": float(np.median(audio_seconds)),
        "loader_share": float(waiting.sum() / taken.sum()),
        "loader_alone": loader_speed(trainer, keys),
    }


def endless_keys(trainer: Trainer) -> Iterator[Key]:
    """Batches of one epoch after another, mixed in length and with SpecAugment on."""
    for epoch in count(trainer.config.sorted_epochs):
        yield from ((e, True, indices) for e, _, indices in trainer.epochs.keys(epoch))


def loader_speed(trainer: Trainer, keys: Sequence[Key]) -> float:
    """Seconds of audio per second from the loader alone, its start left out."""
    workers = trainer.config.num_workers
    loader = iter(make_loader(trainer.train_set, keys, workers))
    for _ in range(max(1, min(workers, len(keys) - 1))):  # the workers have started
        next(loader)
    start = time.perf_counter()
    audio = sum(float(batch.seconds) for batch in loader)
    return audio / (time.perf_counter() - start)
