"""Calibration speech: where it comes from, and what the layers of a model see of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from asr.corpus.manifest import ManifestError, Utterance
from asr.corpus.splits import Data, find_sources, load_splits, places, read_source
from asr.network.checkpoint import Checkpoint
from asr.training.data import BatchDataset, drop_impossible, plain_batches
from asr.training.start import trained_on
from compress.core import Calibration, progress

T = TypeVar("T")
UTTERANCES = 96  # at most, drawn at random
SECONDS = 360.0  # of audio, at most
LONGEST = 1600  # frames of an utterance whose gradients are taken, for the memory they need
FIRST = 800  # frames of an utterance that `output_gradients` takes: it needs no whole text
Maps = Mapping[str, Tensor]
NO_MAPS: Maps = MappingProxyType({})


class Moments(NamedTuple):
    """Of the inputs x of a layer, over frames: their mean (in,) and the mean of x x' (in, in)."""

    mean: Tensor
    gram: Tensor

    @property
    def covariance(self) -> Tensor:
        """Mean of (x - mean)(x - mean)'."""
        return self.gram - torch.outer(self.mean, self.mean)


def load(
    checkpoint: Checkpoint, path: str = "", batch_size: int = 8, most: int = UTTERANCES
) -> Calibration:
    """A fixed random part of the speech at `path`, or of what the checkpoint was trained on.

    Splits named test* are never read. Raises ValueError where there is nothing else.
    """
    where = path or trained_on(checkpoint, "--calibration_data")
    config = checkpoint.model.config
    utterances, _ = drop_impossible(
        speech(checkpoint, where),
        checkpoint.tokenizer,
        checkpoint.features,
        config.total_factor,
    )
    utterances = [u for u in utterances if u.duration <= SECONDS / 10]
    name = " ".join(places(where))
    if not utterances:
        raise ValueError(f"{name}: no utterance that calibration can use (with text, not too long)")
    order = np.random.default_rng(0).permutation(len(utterances))[:most]
    chosen: list[Utterance] = []
    for i in order:
        if sum(u.duration for u in chosen) + utterances[i].duration <= SECONDS:
            chosen.append(utterances[i])
    dataset = BatchDataset(chosen, checkpoint.tokenizer, checkpoint.features)
    return Calibration([dataset[key] for key in plain_batches(chosen, batch_size)], name)


def speech(checkpoint: Checkpoint, where: Data, prefer: str = "train") -> list[Utterance]:
    """The utterances at `where` that are in no split named test*: those of `prefer`* if any.

    Where nothing is named dev*, what is held out is what the checkpoint's training held out.
    """
    sources = find_sources(where)
    allowed = {name: p for name, p in sources.items() if not name.lower().startswith("test")}
    if not allowed:
        raise ManifestError(
            f"{' '.join(places(where))}: only test data ({', '.join(sources)}), which compression "
            "never looks at; name training or dev data"
        )
    here, there = (
        [Path(place).resolve() for place in places(data) if place]
        for data in (where, checkpoint.data.get("train", ""))
    )
    if here == there or any(name.lower().startswith("train") for name in allowed):
        runs = [entry["config"] for entry in checkpoint.history if entry.get("step") == "train"]
        splits = load_splits(where, seed=runs[-1].get("seed", 0) if runs else 0)
        return splits.train if prefer == "train" else splits.dev
    return [utterance for p in allowed.values() for utterance in read_source(p)]


@contextmanager
def record_inputs(
    model: nn.Module, names: Iterable[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Inside, `see(name, x)` is called with every input x (..., in) of the named modules."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: see(name, args[0])

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_moments(
    model: nn.Module, calibration: Calibration, names: Iterable[str], maps: Maps = NO_MAPS
) -> dict[str, Moments]:
    """Moments of the inputs of the named Linears, by name; padding is never counted.

    `maps`: matrices (in, k) for some; there the moments are of x @ map (k,).
    """
    device = next(model.parameters()).device
    sums: dict[str, Tensor] = {}
    grams: dict[str, Tensor] = {}
    frames: dict[str, int] = {}

    def see(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).float()
        x = x @ maps[name] if name in maps else x
        if name not in sums:
            sums[name], grams[name], frames[name] = x.sum(0), x.t() @ x, len(x)
        else:
            sums[name] += x.sum(0)
            grams[name].addmm_(x.t(), x)
            frames[name] += len(x)

    with torch.no_grad(), record_inputs(model, names, see):
        for features, length in progress(utterances(calibration), "calibration"):
            model(features[:length].unsqueeze(0).to(device))
    return {
        name: Moments(sums[name].div_(n).cpu(), grams.pop(name).div_(n).cpu())
        for name, n in frames.items()
    }


def input_grams(model: nn.Module, calibration: Calibration, names: list[str]) -> dict[str, Tensor]:
    """Mean of x x' over the frames that each named Linear sees: (in, in) float32 by name."""
    moments = input_moments(model, calibration, names)
    return {name: moment.gram for name, moment in moments.items()}


def output_gradients(
    model: nn.Module, calibration: Calibration, names: Sequence[str], maps: Maps = NO_MAPS,
    diagonal: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """What hangs on the outputs y of the named Linears: (out, out) float32 by name.

    The sum of g g' over the frames of a layer, for each frame of the model's answer; g is the
    gradient by y of the log probability of tokens drawn from the answer. Thus d' G d is, to second
    order and as if frames were independent, twice the divergence from the model's answer that a
    change d of y brings in a frame (Fisher's information; Martens & Grosse 2015, arXiv 1503.05671).
    Of long utterances the first frames alone are seen. `maps`: matrices (out, k) for some; there it
    is the sum for g @ map: (k, k). With `diagonal` it is the diagonal alone, (out,).
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    sums: dict[str, Tensor] = {}
    outputs: list[tuple[str, Tensor]] = []
    frames = 0
    with frozen(model), record_outputs(model, names, outputs):
        for features, length in progress(utterances(calibration), "gradients"):
            x = features[: min(length, FIRST)].unsqueeze(0).to(device).requires_grad_()
            log_probs = model(x).log_probs[0]  # (T', V)
            drawn = torch.multinomial(log_probs.exp().cpu(), 1, generator=generator).to(device)
            likelihood = log_probs.gather(1, drawn).sum()
            gradients = torch.autograd.grad(likelihood, [output for _, output in outputs])
            for (name, _), gradient in zip(outputs, gradients, strict=True):
                g = gradient.flatten(0, -2)
                g = g @ maps[name] if name in maps else g
                part = g.square().sum(0) if diagonal else g.t() @ g
                sums[name] = sums[name].add_(part) if name in sums else part
            frames += len(log_probs)
            outputs.clear()
    return {name: total.div_(frames).cpu() for name, total in sums.items()}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter takes gradients: those of activations alone cost less."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_()


@contextmanager
def record_outputs(
    model: nn.Module, names: Iterable[str], outputs: list[tuple[str, Tensor]]
) -> Iterator[None]:
    """Inside, `outputs` takes what the named modules give at each call, ready for gradients."""

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: object, output: Tensor) -> None:
            outputs.append((name, output.requires_grad_()))

        return keep

    handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def short(items: Sequence[T], speech: Sequence[tuple[Tensor, int]]) -> list[T]:
    """The items of utterances not too long for gradients; all of them if there are no others."""
    kept = [item for item, (_, n) in zip(items, speech, strict=True) if n <= LONGEST]
    return kept or list(items)


def utterances(calibration: Calibration) -> list[tuple[Tensor, int]]:
    """Features (T, n_mels) and valid frames of every utterance, for one at a time."""
    return [
        (features, int(length))
        for batch in calibration.batches
        for features, length in zip(batch.features, batch.feature_lengths, strict=True)
    ]


def need(calibration: Calibration | None, what: str) -> Calibration:
    """The calibration speech; a ValueError if there is none."""
    if calibration is None or not calibration.batches:
        raise ValueError(f"{what} needs calibration speech: give --calibration_data")
    return calibration
