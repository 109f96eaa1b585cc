"""What each layer costs at each setting, and the mixed setting that fits a size or an error rate.

`scan` compresses one layer at a time and measures how far the model's outputs move: the divergence
of every frame from the float model's, which adds up over layers well enough to choose by (as in
HAWQ-V2, Dong et al. 2019, arXiv 1911.03852), and on request the word error rate. The model hears
one utterance at a time, without padding, since dynamic int8 takes one scale a call.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from asr.common.metrics import error_rates
from asr.corpus.manifest import Utterance
from asr.network.checkpoint import Checkpoint
from asr.training.data import BatchDataset
from asr.training.dev import transcribe_alone
from asr.training.start import trained_on
from compress import core, imitation, packing, recipes
from compress.allocation import allocate
from compress.calibration import need, speech, utterances
from compress.registry import method
from compress.report import file_bytes
from compress.settings import MIXED, in_order, parse_setting

KINDS = (nn.Linear, *core.CONVOLUTIONS)
TRIES = 8  # models that are measured to meet an error rate


def scan(
    checkpoint: Checkpoint, settings: Sequence[str], calibration: core.Calibration,
    dev: Sequence[Utterance] = (), by: str = "layer",
) -> dict[str, Any]:  # fmt: skip
    """Distance, bytes and (with dev data) WER of every layer at every setting; JSON types.

    `by` 'module' compresses the layers of a module together, which is faster. A setting that makes
    a layer no smaller is left out.
    """
    chains = {text: parse_setting(text, by) for text in settings}
    model = checkpoint.model
    example = outputs(model, calibration)
    wer = word_error_rate(checkpoint, model, dev) if dev else None
    rows = []
    for name, layers in core.progress(list(units(model, by).items())):
        bytes_before = stored(model, layers)
        found: dict[str, Any] = {}
        row = {"name": name, "layers": layers, "bytes": bytes_before, "settings": found}
        rows.append(row)
        for text in chains:
            try:
                changed = apply(copy.deepcopy(model), in_order({text: [row]}), calibration)
            except core.UnchangedError:
                continue
            size = stored(changed, layers)
            if size >= bytes_before:
                continue
            found[text] = {
                "bytes": size,
                "distance": distance(outputs(changed, calibration), example),
                "wer": word_error_rate(checkpoint, changed, dev) if dev else None,
            }
    if not any(row["settings"] for row in rows):
        raise ValueError(f"none of the settings makes a layer smaller: {', '.join(settings)}")
    return {
        "settings": list(settings), "wer": wer, "bytes": stored(model, [""]),
        "source": calibration.source, "layers": rows,
    }  # fmt: skip


def apply(model: nn.Module, steps: Sequence[core.Step], calibration: core.Calibration) -> nn.Module:
    """The model after the steps, which hear the speech only if compress.py will let them."""
    for step in steps:
        heard = calibration if recipes.needs_calibration(step) else None
        model = method(step.method).apply(model, step.config, heard)
    return model


def units(model: nn.Module, by: str) -> dict[str, list[str]]:
    """The plain Linears and convolutions, one by one or by the module they are in."""
    names = [name for name, _ in core.layers(model, kinds=KINDS)]
    if by == "layer":
        return {name: [name] for name in names}
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        module = ".".join(parts[:3]) if parts[0] == "blocks" else parts[0]
        groups.setdefault(module, []).append(name)
    return groups


def stored(model: nn.Module, layers: Sequence[str]) -> int:
    """Bytes that these modules and all in them take in a file."""
    return sum(
        packing.stored_bytes(packing.own_state(module), getattr(module, "entropy_coding", False))
        for name in layers
        for module in model.get_submodule(name).modules()
    )


Outputs = list[tuple[Tensor, Tensor]]  # log-probabilities (1, T', V) and lengths, by utterance


@torch.no_grad()
def outputs(model: nn.Module, calibration: core.Calibration) -> Outputs:
    """What the model says to every utterance."""
    model.eval()
    heard = utterances(calibration)
    results = [model(features[None, :length], torch.tensor([length])) for features, length in heard]
    return [(output.log_probs, output.lengths) for output in results]


def distance(found: Outputs, example: Outputs) -> float:
    """Mean Kullback-Leibler divergence of a frame from the example, in nats."""
    pairs = zip(found, example, strict=True)
    total = sum(float(imitation.divergence(a, b, lengths)) for (a, lengths), (b, _) in pairs)
    return total / sum(int(lengths) for _, lengths in example)


def word_error_rate(checkpoint: Checkpoint, model: nn.Module, dev: Sequence[Utterance]) -> float:
    dataset = BatchDataset(dev, checkpoint.tokenizer, checkpoint.features)
    texts = transcribe_alone(model, dataset, checkpoint.tokenizer)
    return float(error_rates([u.text for u in dev], texts)["wer"])


def read_scan(path: str | Path, model: nn.Module) -> dict[str, Any]:
    """What `scan` found for this model; a ValueError for another file or model."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = {layer: row for row in found["layers"] for layer in row["layers"]}
        settings = [parse_setting(text) for text in found["settings"]]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; scripts/sensitivity.py writes one") from None
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{path}: not a file of scripts/sensitivity.py") from None
    present = {name: m for name, m in model.named_modules() if type(m) in KINDS}
    if not settings or rows.keys() != present.keys() or found["bytes"] != stored(model, [""]):
        raise ValueError(f"{path}: was made for another model; repeat scripts/sensitivity.py")
    return cast(dict[str, Any], found)


def smallest(found: dict[str, Any]) -> float:
    """Bytes of the stored tensors with every layer at the least of its settings."""
    return float(found["bytes"]) - sum(
        row["bytes"] - min([row["bytes"], *(o["bytes"] for o in row["settings"].values())])
        for row in found["layers"]
    )


def fit_size(found: dict[str, Any], target: float) -> list[core.Step]:
    """The steps that bring the stored tensors to `target` bytes at the least distance.

    One step a setting, or several in order, with the layers that get it. The target is not below
    `smallest`.
    """
    rows = found["layers"]
    sizes, losses, names = [], [], []
    for row in rows:
        options = row["settings"]
        names.append([None, *options])
        sizes.append(np.array([row["bytes"], *(o["bytes"] for o in options.values())], float))
        losses.append(np.array([0.0, *(max(o["distance"], 0.0) for o in options.values())]))
    fixed = found["bytes"] - sum(row["bytes"] for row in rows)
    choice = allocate(sizes, losses, target - fixed)
    chosen: dict[str, list[dict[str, Any]]] = {}
    for row, texts, j in zip(rows, names, choice, strict=True):
        if texts[j] is not None:
            chosen.setdefault(texts[j], []).append(row)
    return in_order(chosen)


def fit_file(
    found: dict[str, Any], target: float, file_bytes: Callable[[list[core.Step]], int]
) -> list[core.Step]:
    """`fit_size` for the file itself, whose bytes after given steps `file_bytes` tells.

    A ValueError says how small the file can be where that is not small enough.
    """
    aim, least = target, smallest(found)
    while True:
        aim = max(aim, least)
        steps = fit_size(found, aim)
        size = file_bytes(steps)
        if size <= target:
            return steps
        if aim == least:
            raise ValueError(
                f"{target / 1e6:.7g} MB is out of reach of {', '.join(found['settings'])}: the "
                f"smallest file they make has {size:,} bytes, {size / 1e6:.6f} MB"
            )
        aim -= 1.02 * (size - target)


def fit_wer(
    found: dict[str, Any], increase: float, wer: Callable[[list[core.Step]], float]
) -> tuple[list[core.Step], float, float]:
    """The smallest mix whose error rate is at most (1 + increase) times that without steps.

    And the error rates without steps and with these.

    `wer` measures the model after given steps, on dev data; the sizes are searched by bisection.
    """
    before = after = wer([])
    limit = before * (1 + increase)
    low, high = smallest(found), float(found["bytes"])
    best: list[core.Step] | None = None
    for number in range(TRIES):
        aim = low if number == 0 else (low * high) ** 0.5  # perhaps all that is possible
        steps = fit_size(found, aim)
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


def dev_speech(checkpoint: Checkpoint, path: str = "") -> list[Utterance]:
    """The dev data at `path`, or that of the training; a ValueError where there is none."""
    return speech(checkpoint, path or trained_on(checkpoint, "--dev_data"), "dev")


def choose_steps(
    checkpoint: Checkpoint, found: dict[str, Any] | None, calibration: core.Calibration | None,
    target_bytes: float, max_wer_increase: float, dev: Sequence[Utterance] = (),
) -> list[core.Step]:  # fmt: skip
    """The mix for a size of the file in bytes or, where that is 0, for a rise of the dev WER.

    From a scan, or one made now, by modules. Prints the dev WER before and after where it is asked.
    """
    if found is None:
        found = scan(checkpoint, MIXED, need(calibration, "a scan"), by="module")

    def changed(steps: list[core.Step]) -> Checkpoint:
        return core.run(copy.deepcopy(checkpoint), steps, calibration)

    if target_bytes:
        return fit_file(found, target_bytes, lambda steps: file_bytes(changed(steps)))
    steps, before, after = fit_wer(
        found, max_wer_increase,
        lambda steps: word_error_rate(checkpoint, changed(steps).model, dev),
    )  # fmt: skip
    print(f"dev WER {before:.2%} before, {after:.2%} after ({len(dev)} utterances)")
    return steps
