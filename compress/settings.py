"""The settings that a scan tries on a layer: one step, or several in order with + between.

quantization:precision=int4,ends=same
factorization:rank=48+quantization:precision=int4,ends=same
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from compress import core, recipes
from compress.registry import method

INT8, INT4, INT2, TERNARY = (
    f"quantization:precision={precision},ends=same"
    for precision in ("int8", "int4", "int2", "ternary")
)
NARROW = "pruning:pruning_type=structured,sparsity=0.3"
LOW_RANK = "factorization:rank=48"
SETTINGS = (INT8, INT4, INT2, TERNARY)
MIXED = (
    *SETTINGS,
    f"{NARROW}+{INT8}",
    f"{NARROW}+{INT4}",
    f"{LOW_RANK}+{INT8}",
    f"{LOW_RANK}+{INT4}",
)
Row = dict[str, Any]  # of a scan: its name, layers, bytes and settings


def parse_setting(text: str, by: str = "module") -> list[core.Step]:
    """The steps of a setting for a scan by layer or module; ValueError."""
    steps = [parse_step(part, text, by) for part in text.split("+")]
    if [rank(step) for step in steps] != sorted({rank(step) for step in steps}):
        raise ValueError(
            f"setting {text!r}: pruning comes first, factorization next, what packs last, each once"
        )
    return steps


def parse_step(part: str, text: str, by: str) -> core.Step:
    """A step from 'method:option=value,option=value'."""
    name, _, options = part.partition(":")
    values: dict[str, Any] = {}
    for pair in filter(None, options.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"setting {text!r}: {pair!r} is not option=value")
        try:
            values[key.strip()] = json.loads(value)
        except ValueError:
            values[key.strip()] = value.strip()
    step = recipes.make_step(name.strip(), values)
    if not isinstance(step.config, core.Selection):
        raise ValueError(f"setting {text!r}: {name} does not change single layers")
    recipes.expand([step])  # raises where it cannot do without fine-tuning
    if {"include", "exclude"} & values.keys() or step.tuning.fine_tune_epochs:
        raise ValueError(f"setting {text!r}: a scan chooses the layers and does not fine-tune")
    if "size_ratio" in values:
        raise ValueError(f"setting {text!r}: size_ratio is of a whole file; name rank or sparsity")
    if by == "layer" and of_modules(step):
        raise ValueError(f"setting {text!r} is of whole modules: scan them with --by module")
    return step


def of_modules(step: core.Step) -> bool:
    """Whether a step takes names of modules, not of layers."""
    return getattr(step.config, "pruning_type", "") == "structured"


def rank(step: core.Step) -> int:
    """Which steps come first: units go, then zeros, then ranks; what packs is last."""
    if of_modules(step):
        return 0
    if hasattr(method(step.method), "freeze"):
        return 3
    return 1 if step.method == "pruning" else 2


def restricted(step: core.Step, rows: Sequence[Row], inside: bool = False) -> core.Step:
    """The step for these rows of a scan only, or also for what is `inside` their layers by then."""
    if of_modules(step):
        names = [row["name"] for row in rows]
    else:
        names = [name for row in rows for name in row["layers"]]
    if inside:
        names = [pattern for name in names for pattern in (name, f"{name}.*")]
    return replace(step, config=replace(step.config, include=",".join(names)))


def in_order(chosen: dict[str, list[Row]]) -> list[core.Step]:
    """The steps that give every row its setting, those that come first in all of them first."""
    steps = [
        restricted(step, rows, number > 0)
        for text, rows in chosen.items()
        for number, step in enumerate(parse_setting(text))
    ]
    return sorted(steps, key=rank)
