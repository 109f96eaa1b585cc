"""What every compression method shares: selecting layers, replacing them, the run.

A method is a folder here, found by `methods()`. Its package has

    @dataclass(frozen=True)
    class Config(Selection):    # one flag and recipe option a field; checks in __post_init__
        ...

    def apply(model, config, calibration=None) -> nn.Module:
        for name, linear in progress(linears(model, config.include, config.exclude)):
            replace(model, name, MyLayer.from_linear(linear, ...))      # or keep(linear, "why not")
        return model

`apply` may change the model it is given. A Config whose property `needs_calibration` is true gets
calibration speech, by default of the training data.

A layer that stays in a checkpoint is an nn.Module that the package names, with `self.args` (JSON
types) such that `MyLayer(**args)` builds it empty; parameters and buffers are filled on loading.
Integer tensors stay one number an element in memory: `compress.packing` stores them in as few bits
as they need, zeros as a bit mask, and float32 values that are exact in fp16 as fp16, so round with
`round_to_half` what may be stored so. A layer whose `forward` should not go into an ONNX graph as
it is has `onnx_layer(compute)`, see `asr.network.onnx_layers`.

Fine-tuning (`fine_tune_epochs` > 0) runs after `apply`. A method that trains another form of its
layers has `prepare` (same signature, used in place of `apply`) and `freeze(model, config)`, used
afterwards: fake quantisation, codebooks to be rounded. With `freeze`, what `apply` alone gives is
kept where it hears held-out speech better. `update(config, model, fraction)` is called before each
step of training, 0 to 1 of it done: gradual pruning. Weights that are zero stay zero.
`why_kept(model, name, config)` may tell the report why a layer of the finished model is as it was.

A method may have other defaults than fine-tuning has (`TUNING`, a dict), another share of the
learning rate in training (`learning_rate_share(config)`), and leave out options (`WITHOUT`, names);
`train(checkpoint, first, config, tuning, folder)` in place of fine-tuning, where `first` is the
checkpoint before the first step; `check(checkpoint, config, tuning)`, which raises ValueError
before any step is taken; and `parts(config)`: the Configs of several steps in its place, which
share its epochs.

Shape-changing methods (pruning, factorization, distillation) come before packing ones (clustering,
quantization): `linears` yields plain nn.Linear only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from dataclasses import replace as replace_fields
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from asr.network.checkpoint import Checkpoint, check_finite
from asr.network.model import ConformerCTC
from asr.training.data import Batch
from compress import finetuning, packing
from compress.held_out import untrained_is_better
from compress.registry import method

T = TypeVar("T")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
EVALUATION = "evaluation"  # a step of recipes that measures and changes nothing


class UnchangedError(ValueError):
    """A method finds no layer of its kind, or none that it would make smaller."""


@dataclass(frozen=True)
class Calibration:
    """Speech that a method may look at: batches as in training; `source` names it in messages."""

    batches: Sequence[Batch]
    source: str = ""


@dataclass(frozen=True)
class Selection:
    """Which layers: fnmatch patterns on module names, several with commas between."""

    include: str = field(default="*", metadata={"help": "patterns of layer names to compress"})
    exclude: str = field(default="", metadata={"help": "patterns of layer names to leave alone"})


@dataclass(frozen=True)
class Evaluation:
    """The options of a step that measures the model as it is there."""

    test_data: str


@dataclass(frozen=True)
class Step:
    """One step of a recipe."""

    method: str
    config: Any  # the method's Config
    tuning: finetuning.Options = field(default_factory=finetuning.Options)


def selected(name: str, include: str = "*", exclude: str = "") -> bool:
    """Whether a module name matches one of the include and none of the exclude patterns."""
    inside, outside = (
        any(fnmatchcase(name, part.strip()) for part in patterns.split(","))
        for patterns in (include, exclude)
    )
    return inside and not outside


def layers(
    model: nn.Module, include: str = "*", exclude: str = "",
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,),
) -> list[tuple[str, nn.Module]]:  # fmt: skip
    """Names and modules of exactly these kinds that match; UnchangedError if there are none."""
    plain = [(name, m) for name, m in model.named_modules() if type(m) in kinds]
    found = [(name, m) for name, m in plain if selected(name, include, exclude)]
    if found:
        return found
    replaced = [name for name, m in model.named_modules() if is_replaced(m)]
    wanted = f"include {include!r}" + (f" and exclude {exclude!r}" if exclude else "")
    have = "/".join(kind.__name__ for kind in kinds)
    message = f"no layer matches {wanted}: the model has {len(plain)} plain {have} layers"
    if plain:
        message += f", e.g. {plain[0][0]}"
    if replaced:
        message += (
            f" and {len(replaced)} already replaced ones, e.g. {replaced[0]} "
            f"({type(model.get_submodule(replaced[0])).__name__}); put shape-changing methods "
            "before packing ones, or start from the float checkpoint"
        )
    raise UnchangedError(message)


def linears(model: nn.Module, include: str = "*", exclude: str = "") -> list[tuple[str, nn.Linear]]:
    """Names and modules of the plain nn.Linear that match; UnchangedError if there are none."""
    return cast(list[tuple[str, nn.Linear]], layers(model, include, exclude))


def unmatched(step: Step, names: Iterable[str]) -> list[str]:
    """A line for each pattern of a step's include and exclude that fits none of the names."""
    if not isinstance(step.config, Selection):
        return []
    names = list(names)
    options = {"include": step.config.include, "exclude": step.config.exclude}
    if not any(selected(name, step.config.include) for name in names):
        del options["include"]  # the step itself fails, and says so
    return [
        f"--{option} {pattern.strip()!r} fits no layer"
        for option, patterns in options.items()
        for pattern in patterns.split(",")
        if pattern.strip() and not any(selected(name, pattern) for name in names)
    ]


def is_replaced(module: nn.Module) -> bool:
    """Whether a module is a layer of this package."""
    return type(module).__module__.startswith("compress.") and hasattr(module, "args")


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a layer of this package that holds integers."""
    names = {name for name, _ in module.named_buffers(recurse=False)}
    return is_replaced(module) and bool(names & {"qweight", "indices"})


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts `layer` in the place of the submodule `name`, in the same training mode."""
    layer.train(model.get_submodule(name).training)
    model.set_submodule(name, layer, strict=True)


def keep(module: nn.Module, reason: str) -> None:
    """Leaves a layer in float and says why, for the report."""
    cast(Any, module).kept = reason


def why_kept(model: nn.Module, name: str, step: Step) -> str:
    """Why a step without a word of `keep` left a layer as it was; "" where it was not selected.

    A method's own `why_kept(model, name, config)` goes before.
    """
    own = getattr(method(step.method), "why_kept", None)
    if own:
        return cast(str, own(model, name, step.config))
    assert isinstance(step.config, Selection)
    if not selected(name, step.config.include, step.config.exclude):
        return ""
    return f"not a layer that {step.method} changes"


def progress(items: Sequence[T], what: str = "layers") -> Iterable[T]:
    """The items with a progress bar on a terminal."""
    return cast(Iterable[T], tqdm(items, desc=what, unit="layer", leave=False, disable=None))


def round_to_half(tensor: Tensor) -> Tensor:
    """float32 values rounded to fp16, so that they are stored in two bytes; too large ones stay."""
    rounded = tensor.to(torch.float16).to(torch.float32)
    return torch.where(torch.isfinite(rounded), rounded, tensor)


def round_own(module: nn.Module) -> None:
    """Rounds a module's own float tensors to fp16 values."""
    for tensor in packing.own_state(module).values():
        if tensor.dtype == torch.float32:
            tensor.copy_(round_to_half(tensor))


def is_half(model: nn.Module) -> bool:
    """Whether fp16 holds every float number of a model exactly, so that its file is of fp16."""
    floats = (t for t in model.state_dict().values() if t.dtype == torch.float32)
    return all(torch.equal(tensor, tensor.to(torch.float16).to(torch.float32)) for tensor in floats)


def round_rest(model: nn.Module) -> None:
    """Rounds all but the Linears and convolutions that a packing method has left alone."""
    for module in model.modules():
        if type(module) not in (nn.Linear, *CONVOLUTIONS):
            round_own(module)


def run(
    checkpoint: Checkpoint, steps: Sequence[Step], calibration: Calibration | None = None,
    folder: Path | None = None,
) -> Checkpoint:  # fmt: skip
    """Applies the steps in order; the given checkpoint's model may be changed on the way.

    The result has no resume state and one history entry more a step; a model that fp16 holds stays
    one. `folder` is where fine-tuning may keep what it needs to resume. Raises CheckpointError for
    weights that are not finite.
    """
    check_finite(checkpoint.model)
    check(checkpoint, steps)
    trains = any(step.tuning.fine_tune_epochs for step in steps)
    first = replace_fields(checkpoint, model=copy.deepcopy(checkpoint.model) if trains else
                           checkpoint.model)  # fmt: skip
    checkpoint = replace_fields(checkpoint, training=None)
    for step in changes(steps):
        checkpoint = take(step, checkpoint, first, calibration, folder)
    return checkpoint


def changes(steps: Sequence[Step]) -> list[Step]:
    """The steps that change the model."""
    return [step for step in steps if step.method != EVALUATION]


def check(checkpoint: Checkpoint, steps: Sequence[Step]) -> None:
    """Raises ValueError now rather than after the work."""
    read: set[str] = set()
    for step in changes(steps):
        if step.tuning.fine_tune_epochs:
            where = finetuning.data_path(checkpoint, step.tuning)
            if read and str(where) not in read:  # that of the first is read at once
                finetuning.data(checkpoint, step.tuning)
            read.add(str(where))
        own = getattr(method(step.method), "check", None)
        if own:
            own(checkpoint, step.config, step.tuning)


def take(
    step: Step, checkpoint: Checkpoint, first: Checkpoint, calibration: Calibration | None = None,
    folder: Path | None = None,
) -> Checkpoint:  # fmt: skip
    """The checkpoint after one step; `first` is the one before the first step, which teaches."""
    module, half = method(step.method), is_half(checkpoint.model)
    tuning, epochs = step.tuning, step.tuning.fine_tune_epochs
    change = getattr(module, "prepare", module.apply) if epochs else module.apply
    untrained = None
    if epochs and hasattr(module, "freeze"):
        untrained = module.apply(copy.deepcopy(checkpoint.model), step.config, calibration).eval()
    model = change(checkpoint.model, step.config, calibration)
    options = asdict(step.config) | (asdict(tuning) if epochs else {})
    history = [*checkpoint.history, {"step": step.method, "config": options}]
    checkpoint = replace_fields(checkpoint, model=model.eval(), history=history)
    if epochs:
        if hasattr(module, "train"):
            model = module.train(checkpoint, first, step.config, tuning, folder)
        else:
            update = partial(module.update, step.config) if hasattr(module, "update") else None
            share = getattr(module, "learning_rate_share", lambda _: finetuning.SHARE)(step.config)
            run = finetuning.FineTuning(share)
            model = finetuning.fine_tune(checkpoint, first.model, tuning, folder, update, run)
        if hasattr(module, "freeze"):
            model = module.freeze(model, step.config)
        if untrained and untrained_is_better(untrained, model.eval(), checkpoint, tuning):
            model, history[-1] = untrained, {"step": step.method, "config": asdict(step.config)}
        checkpoint = replace_fields(checkpoint, model=cast(ConformerCTC, model.eval()))
    if half:
        for part in checkpoint.model.modules():
            round_own(part)
    return checkpoint


def parameter_count(module: nn.Module) -> int:
    """Weights and biases of a module itself, packed or not, without scales and codebooks."""
    own = packing.own_state(module)
    if is_replaced(module):
        return sum(own[key].numel() for key in ("qweight", "indices", "bias") if key in own)
    return sum(p.numel() for p in module.parameters(recurse=False))
