"""Speed of training and of inference, as scripts/benchmark.py reports them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch

from asr.audio import audio_duration
from asr.checkpoint import Checkpoint
from asr.config import preset
from asr.data import Key, make_loader
from asr.manifest import Utterance
from asr.model import ConformerCTC, count_parameters
from asr.timing import TimedModel
from asr.tokenizer import Tokenizer
from asr.train_config import TrainConfig
from asr.training import Trainer

RATE = 16000
AHEAD = 4  # batches that a worker of asr.data.make_loader keeps ready


@contextmanager
def synthetic_speech(files: int, seed: int = 0) -> Iterator[list[Utterance]]:
    """`files` WAV files of noise of 2 to 16 s, with random texts of 14 letters a second."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlu "))
    with tempfile.TemporaryDirectory() as folder:
        utterances = []
        for number, seconds in enumerate(rng.uniform(2, 16, files).round(2).tolist()):
            path = Path(folder) / f"{number}.wav"
            soundfile.write(path, noise(seconds, rng), RATE, subtype="PCM_16")
            text = " ".join("".join(rng.choice(letters, int(14 * seconds))).split())
            utterances.append(Utterance(str(path), seconds, text))
        yield utterances


def noise(seconds: float, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """White noise (N,) at 16 kHz, swelling four times a second as syllables do."""
    n = int(seconds * RATE)
    swell = 1 + np.sin(np.arange(n, dtype=np.float32) * (2 * np.pi * 4 / RATE))
    waveform: npt.NDArray[np.float32] = 0.05 * swell * rng.standard_normal(n, dtype=np.float32)
    return waveform


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
    cuda = trainer.device.type == "cuda"
    # more batches than are trained, so that the workers are busy until the last step
    needed = (warmup + steps) * config.accumulate + AHEAD * config.num_workers + 1
    keys = list(islice(endless_keys(trainer), needed))
    batches = trainer.groups(iter(make_loader(trainer.train_set, keys, config.num_workers, cuda)))
    rows: list[tuple[float, float, float]] = []  # seconds of audio, waiting, in all
    for number in range(warmup + steps):
        trainer.wait_seconds, start = 0.0, time.perf_counter()
        group = next(batches)
        trainer.train_step(group, progress=number / (warmup + steps))
        if cuda:
            torch.cuda.synchronize(trainer.device)
        if number >= warmup:
            audio = sum(batch.seconds for batch in group)
            rows.append((audio, trainer.wait_seconds, time.perf_counter() - start))
    del batches
    audio_seconds, waiting, taken = np.array(rows).T
    return {
        "preset": preset_name,
        "parameters": parameters,
        "precision": trainer.precision,
        "device": trainer.device.type,
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
        yield from ((e, True, indices) for e, _, indices in trainer.epoch_keys(epoch))


def loader_speed(trainer: Trainer, keys: Sequence[Key]) -> float:
    """Seconds of audio per second from the loader alone, its start left out."""
    workers = trainer.config.num_workers
    loader = iter(make_loader(trainer.train_set, keys, workers))
    for _ in range(max(1, min(workers, len(keys) - 1))):  # the workers have started
        next(loader)
    start = time.perf_counter()
    audio = sum(float(batch.seconds) for batch in loader)
    return audio / (time.perf_counter() - start)


def infer_speed(
    model_paths: Sequence[str | Path], audio_path: str | Path, threads: Sequence[int],
    rounds: int, warmup: int = 3,
) -> list[dict[str, Any]]:  # fmt: skip
    """Latency in seconds of each model with each number of threads on one recording.

    Every model runs in its own process. Rounds are interleaved, all models in turn, so that a
    disturbance of the machine falls on all of them. `speedup` is the median of the first model with
    the same threads over this one's.
    """
    seconds = audio_duration(audio_path)
    cases = [(path, n) for n in threads for path in model_paths]
    with ExitStack() as stack:
        models = [stack.enter_context(TimedModel(path, n, [audio_path])) for path, n in cases]
        for _ in range(warmup):
            for model in models:
                model.round()
        times = np.array([[model.round()[0] for model in models] for _ in range(rounds)])
        peaks = [model.peak_rss() for model in models]
    medians = np.median(times, axis=0)
    rows: list[dict[str, Any]] = []
    for i, (path, n) in enumerate(cases):
        first = medians[i - i % len(model_paths)]
        rows.append({
            "model": str(path), "threads": n, "bytes": Path(path).stat().st_size,
            "latency": float(medians[i]), "fastest": float(times[:, i].min()),
            "rtf": float(medians[i] / seconds), "speedup": float(first / medians[i]),
            "peak_rss": peaks[i],
        })  # fmt: skip
    return rows
