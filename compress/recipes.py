"""Steps from names and options: of flags, or of a recipe in a JSON or TOML file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from dataclasses import replace as replace_fields
from typing import Any

from asr.runtime.cli import read_structured
from compress import finetuning
from compress.core import EVALUATION, Evaluation, Step
from compress.registry import method


def make_step(name: str, options: dict[str, Any]) -> Step:
    """A checked step; a ValueError lists the methods or the options that are allowed."""
    if name == EVALUATION:
        if options.keys() != {"test_data"} or not isinstance(options["test_data"], str):
            raise ValueError("evaluation takes test_data, the speech to measure on, and no more")
        return Step(name, Evaluation(**options))
    module = method(name)
    own = {f.name: f for f in fields(module.Config)}
    without = getattr(module, "WITHOUT", ())
    tuning = {f.name: f for f in fields(finetuning.Options) if f.name not in without}
    allowed = own | tuning
    options = getattr(module, "TUNING", {}) | options
    for key, value in options.items():
        if key not in allowed:
            raise ValueError(
                f"unknown option {key!r} of {name}; the options are {', '.join(allowed)}"
            )
        kind = type(allowed[key].default)
        number = kind is float and type(value) is int
        if type(value) is not kind and not number:
            raise ValueError(f"option {key} of {name} must be {kind.__name__}, not {value!r}")
        if kind is float and not math.isfinite(value):
            raise ValueError(f"option {key} of {name} must be a finite number, not {value}")
        limit = allowed[key].metadata.get("above")  # where the default 0 means: not given
        if limit is not None and value <= limit:
            raise ValueError(f"{key} {value} is out of range: it must be above {limit}")
    for key in options:
        other = allowed[key].metadata.get("in_place_of")
        if other in options:
            raise ValueError(f"give either {key} or {other}: {key} is in place of {other}")
    idle = [key for key in options if key in tuning and key != "fine_tune_epochs"]
    if idle and not options.get("fine_tune_epochs"):
        raise ValueError(f"{idle[0]} is for fine-tuning: give fine_tune_epochs above 0 as well")
    return Step(
        name,
        module.Config(**{k: v for k, v in options.items() if k in own}),
        finetuning.Options(**{k: v for k, v in options.items() if k in tuning}),
    )


def needs_calibration(step: Step) -> bool:
    """Whether a step looks at calibration speech."""
    return bool(getattr(step.config, "needs_calibration", False))


def read_recipe(path: str, fine_tune_data: str = "") -> list[Step]:
    """Steps of a JSON or TOML file: a list under `steps`, or in JSON the list alone.

    Each step is an object with `method` and that method's options; the method `evaluation` with
    `test_data` measures. Steps that train take `fine_tune_data` where they name no data.
    """
    contents = read_structured(path)
    steps = contents.get("steps") if isinstance(contents, dict) else contents
    if not isinstance(steps, list) or not steps:
        raise ValueError(f"{path}: expected a list of steps, each with a method and its options")
    unknown = [key for key in contents if key != "steps"] if isinstance(contents, dict) else []
    if unknown:
        raise ValueError(
            f"{path}: unknown key {unknown[0]!r}; a recipe has the one key 'steps', and options "
            "belong to a step"
        )
    made = []
    for number, entry in enumerate(steps, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("method"), str):
            raise ValueError(f"{path}, step {number}: expected an object with a method")
        options = {key: value for key, value in entry.items() if key != "method"}
        try:
            made.append(make_step(entry["method"], options))
        except ValueError as error:
            raise ValueError(f"{path}, step {number}: {error}") from None
    return learning_from(made, fine_tune_data, path) if fine_tune_data else made


def learning_from(steps: Sequence[Step], fine_tune_data: str, path: str) -> list[Step]:
    """The steps of a recipe, with that data for those that train and name none."""
    if not any(step.tuning.fine_tune_epochs for step in steps):
        raise ValueError(f"--fine_tune_data {fine_tune_data}: no step of {path} trains")
    named = ((step, step.tuning.fine_tune_data or fine_tune_data) for step in steps)
    return [
        replace_fields(step, tuning=replace_fields(step.tuning, fine_tune_data=data))
        if step.tuning.fine_tune_epochs
        else step
        for step, data in named
    ]


def expand(steps: Sequence[Step]) -> list[Step]:
    """The steps, those of several parts as one each; the parts share the epochs."""
    found: list[Step] = []
    for step in steps:
        if step.method == EVALUATION:
            found.append(step)
            continue
        parts = getattr(method(step.method), "parts", lambda config: [config])(step.config)
        epochs, n = step.tuning.fine_tune_epochs, len(parts)
        if n > 1 and epochs < n:
            raise ValueError(
                f"{step.method} in {n} steps trains after each: give fine_tune_epochs of at least "
                f"{n}, not {epochs}"
            )
        for number, config in enumerate(parts):
            share = epochs * (number + 1) // n - epochs * number // n
            tuning = replace_fields(step.tuning, fine_tune_epochs=share)
            found.append(Step(step.method, config, tuning))
    return found
