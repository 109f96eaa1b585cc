"""What compressing each layer costs at each setting, for `compress.mixing` to choose by.

`scan` compresses one layer at a time and measures how far the model's outputs move: the divergence
of every frame from the float model's, which adds up over layers well enough to choose by (as in
HAWQ-V2, Dong et al. 2019, arXiv 1911.03852), and on request the word error rate. The model hears
one utterance at a time, without padding, since dynamic int8 takes one scale a call.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from asr.common.metrics import error_rates
from asr.corpus.manifest import Utterance
from asr.network.checkpoint import Checkpoint
from asr.training.data import BatchDataset
from asr.training.dev import transcribe_alone
from compress import core, imitation, packing, recipes
from compress.calibration import utterances
from compress.registry import method
from compress.settings import in_order, parse_setting

KINDS = (nn.Linear, *core.CONVOLUTIONS)


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


def apply(
    model: nn.Module, steps: Sequence[core.Step], calibration: core.Calibration | None
) -> nn.Module:
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
