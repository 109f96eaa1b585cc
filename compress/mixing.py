"""The mix of settings that fits a size, a latency or an error rate at the least loss.

From what `compress.sensitivity` has found, layer by layer, and for a latency from what
`compress.latency` has. The whole file is measured in the end, so what is asked for holds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from asr.corpus.manifest import Utterance
from asr.measure.machine import busy_cores, busy_note
from asr.network.checkpoint import Checkpoint
from asr.training.start import trained_on
from compress import core
from compress.allocation import allocate
from compress.calibration import need, speech
from compress.latency import add_times, latency
from compress.report import file_bytes
from compress.sensitivity import scan, word_error_rate
from compress.settings import MIXED, in_order

TRIES = 8  # models that are measured to meet an error rate or a latency
CLOSE = 0.98  # of a latency: near enough to stop
BYTES, MS = "bytes", "ms"  # what a scan says of layers, settings and the whole
Steps = list[core.Step]


@dataclass(frozen=True)
class Goal:
    """What a mix is to reach: one of these, or none where no mix is asked for."""

    size_mb: float = 0.0
    latency_ms: float = 0.0  # of the .onnx, see `compress.latency`
    max_wer_increase: float | None = None  # share of the dev WER

    def __post_init__(self) -> None:
        if min(self.size_mb, self.latency_ms, self.max_wer_increase or 0) < 0:
            raise ValueError(
                "--target_size_mb and --target_latency_ms must be above 0, "
                "--max_wer_increase not below 0"
            )
        asked = bool(self.size_mb) + bool(self.latency_ms) + (self.max_wer_increase is not None)
        if asked > 1:
            raise ValueError(
                "give one of --target_size_mb, --target_latency_ms and --max_wer_increase"
            )


@dataclass(frozen=True)
class Mix:
    """The steps that reach a goal, and what was measured on the way, for the report."""

    steps: Steps
    about: dict[str, float]


def choose_mix(
    checkpoint: Checkpoint, found: dict[str, Any] | None, calibration: core.Calibration | None,
    goal: Goal, dev: Sequence[Utterance] = (),
) -> Mix:  # fmt: skip
    """The mix for a goal, from a scan, or one made now, by modules; prints what was measured."""
    if goal.latency_ms and (note := busy_note(busy_cores())):
        print(note)
    if found is None:
        found = scan(checkpoint, MIXED, need(calibration, "a scan"), by="module")

    def changed(steps: Sequence[core.Step]) -> Checkpoint:
        return core.run(copy.deepcopy(checkpoint), steps, calibration)

    if goal.size_mb:
        target = 1e6 * goal.size_mb
        steps = fit_file(found, target, lambda steps: file_bytes(changed(steps)))
        return Mix(steps, {"target_size_mb": goal.size_mb})
    if goal.latency_ms:
        timed = add_times(checkpoint, found, calibration)
        steps, after = fit_latency(timed, goal.latency_ms, lambda steps: latency(changed(steps)))
        print(
            f"latency {timed[MS]:.1f} ms before, {after:.1f} ms after, {goal.latency_ms:g} asked "
            "(10 s of audio, one thread)"
        )
        return Mix(steps, {"target_latency_ms": goal.latency_ms, "latency_ms_before": timed[MS],
                           "latency_ms": after})  # fmt: skip
    steps, wer, after = fit_wer(
        found, goal.max_wer_increase or 0.0,
        lambda steps: word_error_rate(checkpoint, changed(steps).model, dev),
    )  # fmt: skip
    print(f"dev WER {wer:.2%} before, {after:.2%} after ({len(dev)} utterances)")
    return Mix(steps, {"max_wer_increase": goal.max_wer_increase or 0.0, "dev_wer_before": wer,
                       "dev_wer": after})  # fmt: skip


def dev_speech(checkpoint: Checkpoint, path: str = "") -> list[Utterance]:
    """The dev data at `path`, or that of the training; a ValueError where there is none."""
    return speech(checkpoint, path or trained_on(checkpoint, "--dev_data"), "dev")


def least(found: dict[str, Any], cost: str = BYTES) -> float:
    """What all takes, in bytes or ms, with every layer at the least of its settings."""
    return float(found[cost]) - sum(
        row[cost] - min([row[cost], *(o[cost] for o in row["settings"].values())])
        for row in found["layers"]
    )


def fit(found: dict[str, Any], target: float, cost: str = BYTES) -> Steps:
    """The steps that bring the sum of all layers' cost to `target` at the least distance.

    One step a setting, or several in order, with the layers that get it. The target is not below
    `least`.
    """
    rows = found["layers"]
    costs, losses, names = [], [], []
    for row in rows:
        options = row["settings"]
        names.append([None, *options])
        costs.append(np.array([row[cost], *(o[cost] for o in options.values())], float))
        losses.append(np.array([0.0, *(max(o["distance"], 0.0) for o in options.values())]))
    fixed = found[cost] - sum(row[cost] for row in rows)
    reachable = sum(c.min() for c in costs)  # of `least`, which times round differently
    choice = allocate(costs, losses, max(target - fixed, reachable))
    chosen: dict[str, list[dict[str, Any]]] = {}
    for row, texts, j in zip(rows, names, choice, strict=True):
        if texts[j] is not None:
            chosen.setdefault(texts[j], []).append(row)
    return in_order(chosen)


def fit_file(found: dict[str, Any], target: float, file_bytes: Callable[[Steps], int]) -> Steps:
    """`fit` for the file itself, whose bytes after given steps `file_bytes` tells.

    A ValueError says how small the file can be where that is not small enough.
    """
    aim, smallest = target, least(found)
    while True:
        aim = max(aim, smallest)
        steps = fit(found, aim)
        size = file_bytes(steps)
        if size <= target:
            return steps
        if aim == smallest:
            raise ValueError(
                f"{target / 1e6:.7g} MB is out of reach of {', '.join(found['settings'])}: the "
                f"smallest file they make has {size:,} bytes, {size / 1e6:.6f} MB"
            )
        aim -= 1.02 * (size - target)


def fit_latency(
    found: dict[str, Any], target: float, latency: Callable[[Sequence[core.Step]], float]
) -> tuple[Steps, float]:
    """The mix of the least distance whose file takes at most `target` ms, and what it takes.

    `latency` measures the file after given steps. The sum of the layers' times, each taken alone,
    misses that by about the same everywhere: what one try shows, the next aim allows for, within
    bounds. A ValueError says how fast the file can be where that is not fast enough.
    """
    measured = cache(lambda steps: latency(list(steps)))
    low = fastest = least(found, MS)  # too fast, if anything
    high = max(float(found[MS]), fastest)  # too slow, if anything
    aim, best = min(max(target, low), high), None
    for number in range(TRIES):
        if best is None and number == TRIES - 1:
            aim = fastest
        steps = fit(found, aim, MS)
        ms = measured(tuple(steps))
        if ms <= target:
            best, low = (steps, ms), aim
        elif aim == fastest:
            raise ValueError(
                f"{target:g} ms is out of reach of {', '.join(found['settings'])}: the fastest "
                f"file they make takes {ms:.1f} ms on this machine"
            )
        else:
            high = aim
        if CLOSE * target <= ms <= target or low >= high:
            break
        aim = aim + target - ms
        if not low < aim < high:
            aim = fastest if best is None and aim <= low else (low + high) / 2
    assert best is not None
    return best


def fit_wer(
    found: dict[str, Any], increase: float, wer: Callable[[Steps], float]
) -> tuple[Steps, float, float]:
    """The smallest mix whose error rate is at most (1 + increase) times that without steps.

    And the error rates without steps and with these.

    `wer` measures the model after given steps, on dev data; the sizes are searched by bisection.
    """
    before = after = wer([])
    limit = before * (1 + increase)
    low, high = least(found), float(found[BYTES])
    best: Steps | None = None
    for number in range(TRIES):
        aim = low if number == 0 else (low * high) ** 0.5  # perhaps all that is possible
        steps = fit(found, aim)
        measured = wer(steps)
        if measured <= limit:
            best, high, after = steps, aim, measured
            if number == 0:
                break
        else:
            low = aim
    if not best:
        raise ValueError(
            f"no mix of {', '.join(found['settings'])} keeps the word error rate within "
            f"{increase:.1%} of the float model's; allow more, or scan finer settings"
        )
    return best, before, after
