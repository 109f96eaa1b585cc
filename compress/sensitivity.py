"""What each layer costs at each setting, and the mixed setting that fits a size or an error rate.

`scan` compresses one layer at a time and measures how far the model's outputs move: the divergence
of every frame from the float model's, which adds up over layers well enough to choose by (as in
HAWQ-V2, Dong et al. 2019, arXiv 1911.03852), and on request the word error rate.
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

from asr.checkpoint import Checkpoint
from asr.data import BatchDataset, plain_batches
from asr.manifest import Utterance, load_splits
from asr.metrics import error_rates
from asr.training import transcribe_batches
from compress import core, finetuning, packing
from compress.allocation import allocate
from compress.calibration import need
from compress.registry import method
from compress.report import file_bytes

SETTINGS = (
    "quantization:precision=int8",
    "quantization:precision=int4,ends=same",
    "quantization:precision=ternary,ends=same",
)
KINDS = (nn.Linear, *core.CONVOLUTIONS)
TRIES = 8  # models that are measured to meet an error rate


def parse_setting(text: str) -> core.Step:
    """A step from 'method:option=value,option=value'; raises ValueError."""
    name, _, options = text.partition(":")
    values: dict[str, Any] = {}
    for part in filter(None, options.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"setting {text!r}: {part!r} is not option=value")
        try:
            values[key.strip()] = json.loads(value)
        except ValueError:
            values[key.strip()] = value.strip()
    step = core.make_step(name, values)
    if {"include", "exclude"} & values.keys() or step.tuning.fine_tune_epochs:
        raise ValueError(f"setting {text!r}: a scan chooses the layers and does not fine-tune")
    return step


def scan(
    checkpoint: Checkpoint, settings: Sequence[str], calibration: core.Calibration,
    dev: Sequence[Utterance] = (), by: str = "layer",
) -> dict[str, Any]:  # fmt: skip
    """Distance, bytes and (with dev data) WER of every layer at every setting; JSON types.

    `by` 'module' compresses the layers of a module together, which is faster. A setting that makes
    a layer no smaller is left out.
    """
    steps = {text: parse_setting(text) for text in settings}
    model = checkpoint.model
    example = outputs(model, calibration)
    wer = word_error_rate(checkpoint, model, dev) if dev else None
    rows = []
    for name, layers in core.progress(list(units(model, by).items())):
        bytes_before = stored(model, layers)
        found = {}
        for text, step in steps.items():
            config = with_layers(step, layers).config
            try:
                changed = method(step.method).apply(copy.deepcopy(model), config, calibration)
            except ValueError:
                continue  # no layer would shrink
            size = stored(changed, layers)
            if size >= bytes_before:
                continue
            found[text] = {
                "bytes": size,
                "distance": distance(outputs(changed, calibration), example),
                "wer": word_error_rate(checkpoint, changed, dev) if dev else None,
            }
        rows.append({"name": name, "layers": layers, "bytes": bytes_before, "settings": found})
    if not any(row["settings"] for row in rows):
        raise ValueError(f"none of the settings makes a layer smaller: {', '.join(settings)}")
    return {
        "settings": list(settings), "wer": wer, "bytes": stored(model, [""]),
        "source": calibration.source, "layers": rows,
    }  # fmt: skip


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


def with_layers(step: core.Step, layers: Sequence[str]) -> core.Step:
    """The step for these layers only."""
    config = type(step.config)(**{**vars(step.config), "include": ",".join(layers)})
    return core.Step(step.method, config, step.tuning)


def stored(model: nn.Module, layers: Sequence[str]) -> int:
    """Bytes that these modules and all in them take in a file."""
    return sum(
        packing.stored_bytes(packing.own_state(module), getattr(module, "entropy_coding", False))
        for name in layers
        for module in model.get_submodule(name).modules()
    )


Outputs = list[tuple[Tensor, Tensor]]  # log-probabilities and lengths of every batch


@torch.no_grad()
def outputs(model: nn.Module, calibration: core.Calibration) -> Outputs:
    """What the model says to every batch."""
    model.eval()
    results = [model(batch.features, batch.feature_lengths) for batch in calibration.batches]
    return [(output.log_probs, output.lengths) for output in results]


def distance(found: Outputs, example: Outputs) -> float:
    """Mean Kullback-Leibler divergence of a frame from the example, in nats."""
    pairs = zip(found, example, strict=True)
    total = sum(float(finetuning.divergence(a, b, lengths)) for (a, lengths), (b, _) in pairs)
    return total / sum(int(lengths.sum()) for _, lengths in example)


def word_error_rate(checkpoint: Checkpoint, model: nn.Module, dev: Sequence[Utterance]) -> float:
    dataset = BatchDataset(dev, checkpoint.tokenizer, checkpoint.features)
    keys = list(plain_batches(dev, 16, 120.0))
    texts = transcribe_batches(model, dataset, keys, checkpoint.tokenizer)
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


def fit_size(found: dict[str, Any], target: float) -> list[core.Step]:
    """The steps that bring the stored tensors to `target` bytes at the least distance.

    One step a setting, with the layers that get it; raises ValueError where none does.
    """
    rows = found["layers"]
    sizes, losses, names = [], [], []
    for row in rows:
        options = row["settings"]
        names.append([None, *options])
        sizes.append(np.array([row["bytes"], *(o["bytes"] for o in options.values())], float))
        losses.append(np.array([0.0, *(max(o["distance"], 0.0) for o in options.values())]))
    fixed = found["bytes"] - sum(row["bytes"] for row in rows)
    try:
        choice = allocate(sizes, losses, target - fixed)
    except ValueError:
        least = fixed + sum(s.min() for s in sizes)
        raise ValueError(
            f"{target / 1e6:.2f} MB is out of reach of {', '.join(found['settings'])}: "
            f"they come to {least / 1e6:.2f} MB"
        ) from None
    chosen: dict[str, list[str]] = {}
    for row, texts, j in zip(rows, names, choice, strict=True):
        if texts[j] is not None:
            chosen.setdefault(texts[j], []).extend(row["layers"])
    return [with_layers(parse_setting(text), layers) for text, layers in chosen.items()]


def fit_file(
    found: dict[str, Any], target: float, file_bytes: Callable[[list[core.Step]], int]
) -> list[core.Step]:
    """`fit_size` for the file itself, whose bytes after given steps `file_bytes` tells."""
    aim = target
    while True:
        steps = fit_size(found, aim)
        size = file_bytes(steps)
        if size <= target:
            return steps
        aim -= 1.02 * (size - target)


def fit_wer(
    found: dict[str, Any], increase: float, wer: Callable[[list[core.Step]], float]
) -> list[core.Step]:
    """The smallest mix whose error rate is at most (1 + increase) times that without steps.

    `wer` measures the model after given steps, on dev data; the sizes are searched by bisection.
    """
    limit = wer([]) * (1 + increase)
    fixed = found["bytes"] - sum(row["bytes"] for row in found["layers"])
    least = fixed + sum(
        min([row["bytes"], *(o["bytes"] for o in row["settings"].values())])
        for row in found["layers"]
    )
    low, high = float(least), float(found["bytes"])
    best: list[core.Step] | None = None
    for number in range(TRIES):
        aim = low if number == 0 else (low * high) ** 0.5  # perhaps all that is possible
        steps = fit_size(found, aim)
        if wer(steps) <= limit:
            best, high = steps, aim
            if number == 0:
                break
        else:
            low = aim
    if not best:
        raise ValueError(
            f"no mix of {', '.join(found['settings'])} keeps the word error rate within "
            f"{increase:.1%} of the float model's; allow more, or scan finer settings"
        )
    return best


def choose_steps(
    checkpoint: Checkpoint, path: str, calibration: core.Calibration | None,
    target_bytes: float, max_wer_increase: float,
) -> list[core.Step]:  # fmt: skip
    """The mix for a size of the file in bytes or, where that is 0, for a rise of the dev WER.

    From the scan in a file, or one made now, by modules. Dev data is that of the training.
    """
    if path:
        found = read_scan(path, checkpoint.model)
    else:
        found = scan(checkpoint, SETTINGS, need(calibration, "a scan"), by="module")

    def changed(steps: list[core.Step]) -> Checkpoint:
        return core.run(copy.deepcopy(checkpoint), steps, calibration)

    if target_bytes:
        return fit_file(found, target_bytes, lambda steps: file_bytes(changed(steps)))
    data = finetuning.data_path(checkpoint, finetuning.Options())
    seed = finetuning.train_config(checkpoint, finetuning.Options(fine_tune_epochs=1)).seed
    dev = load_splits(data, seed=seed).dev

    def wer(steps: list[core.Step]) -> float:
        return word_error_rate(checkpoint, changed(steps).model, dev)

    return fit_wer(found, max_wer_increase, wer)


def plot(found: dict[str, Any], path: Path) -> None:
    """The distance of every layer at every setting, in the model's order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = found["layers"]
    with_wer = found["wer"] is not None
    figure, axes = pyplot.subplots(
        1 + with_wer, 1, figsize=(10, 4 * (1 + with_wer)), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, key in zip(axes[:, 0], ("distance", "wer"), strict=False):
        for text in found["settings"]:
            points = [(i, row["settings"][text][key]) for i, row in enumerate(rows)
                      if text in row["settings"]]  # fmt: skip
            if key == "wer":
                points = [(i, 100 * (value - found["wer"])) for i, value in points]
            if points:
                axis.plot(*zip(*points, strict=True), ".-", lw=0.8, ms=5, label=text)
        axis.grid(True, alpha=0.3)
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylabel("divergence a frame (nats)")
    axes[0, 0].legend(frameon=False, fontsize=8, ncols=min(3, len(found["settings"])),
                      loc="lower center", bbox_to_anchor=(0.5, 1.0))  # fmt: skip
    if with_wer:
        axes[1, 0].set_ylabel("rise of the WER (points)")
    starts: dict[str, int] = {}
    for i, row in enumerate(rows):
        parts = row["name"].split(".")
        starts.setdefault(f"block {parts[1]}" if parts[0] == "blocks" else parts[0], i)
    axes[-1, 0].set_xticks(list(starts.values()), list(starts), rotation=90, fontsize=8)
    worst = max(
        ((i, o["distance"], row["name"]) for i, row in enumerate(rows)
         for o in row["settings"].values()), key=lambda point: point[1],
    )  # fmt: skip
    axes[0, 0].annotate(worst[2], worst[:2], xytext=(6, 2), textcoords="offset points", fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
