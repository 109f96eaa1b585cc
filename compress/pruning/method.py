"""Pruning: weights become zero, or whole channels and heads disappear.

- unstructured: the weights of least magnitude of Linears and convolutions become zero, or those of
  Linears that speech misses least (`saliency`). In memory the layers stay what they are;
  files store a bit mask and the rest (`compress.packing`). With fine-tuning the share of zeros by
  magnitude grows along a cubic schedule (Zhu & Gupta 2017, arXiv 1710.01878).
- structured: modules become smaller (`structured`), with nothing left of what was removed.

Either may go in several steps with fine-tuning after each (`parts`): by equal shares (Han et al.
2015, arXiv 1506.02626) or along the same cubic curve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from compress import core
from compress.allocation import file_bytes, tensor_bytes
from compress.calibration import Moments, input_moments, need
from compress.pruning import saliency, structured

TYPES = ("unstructured", "structured")
ALLOCATIONS = ("global", "layer")
IMPORTANCES = ("norm", "taylor")
SCHEDULES = ("gradual", "linear", "one-shot")
RAMP = 0.5  # share of fine-tuning in which gradual pruning reaches its sparsity
STEP = 0.01  # by which it grows at a time


@dataclass(frozen=True)
class Config(core.Selection):
    """Options of pruning."""

    pruning_type: str = field(
        default="unstructured", metadata={"help": "zeros, or smaller layers", "choices": TYPES}
    )
    sparsity: float = field(default=0.3, metadata={"help": "share to remove, 0 to 1"})
    size_ratio: float = field(
        default=0.0,
        metadata={
            "help": "times smaller the file is to be, in place of sparsity",
            "above": 1,
            "in_place_of": "sparsity",
        },
    )
    allocation: str = field(
        default="global",
        metadata={
            "help": "the share is of all layers together (of all modules of a kind), or of each",
            "choices": ALLOCATIONS,
        },
    )
    importance: str = field(
        default="norm",
        metadata={
            "help": "what goes first: by the norm of the weights or by what removal does on "
            "calibration speech, where the weights left make up for it",
            "choices": IMPORTANCES,
        },
    )
    refit: bool = field(
        default=True,
        metadata={
            "help": "structured with calibration speech: let the layers that read the units make "
            "up for those removed"
        },
    )
    schedule: str = field(
        default="gradual",
        metadata={
            "help": "with fine-tuning: more and more along a cubic curve (unstructured by norm "
            "while it trains, else in --steps), as much in each of --steps, or all before it",
            "choices": SCHEDULES,
        },
    )
    steps: int = field(
        default=0,
        metadata={"help": "prune so many times, with fine-tuning after each", "above": 1},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity {self.sparsity} must lie in [0, 1)")
        if self.size_ratio and self.size_ratio <= 1:
            raise ValueError(f"size_ratio {self.size_ratio} must be above 1")
        for name, allowed in (
            ("pruning_type", TYPES), ("allocation", ALLOCATIONS), ("importance", IMPORTANCES),
            ("schedule", SCHEDULES),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}"
                )
        if self.steps and self.schedule == "one-shot":
            raise ValueError("schedule one-shot prunes once: leave steps out")
        if self.schedule == "linear" and not self.steps:
            raise ValueError("schedule linear needs steps, the number of times")
        if self.steps and self.size_ratio:
            raise ValueError("steps go with sparsity, not with size_ratio")

    @property
    def needs_calibration(self) -> bool:
        return self.importance == "taylor"

    @property
    def is_gradual(self) -> bool:
        """Whether zeros become more during fine-tuning."""
        by_norm = self.pruning_type == "unstructured" and self.importance == "norm"
        return by_norm and self.schedule == "gradual"


def parts(config: Config) -> list[Config]:
    """The prunings that make up one in steps; each says what is to be gone after it.

    Of units the share of those still there: a third of 90 % is 30 % of all. Of weights the share of
    all, since those that are zero already are counted among them.
    """
    if not config.steps:
        return [config]
    found, gone = [], 0.0
    for number in range(1, config.steps + 1):
        done = number / config.steps
        share = config.sparsity * (done if config.schedule == "linear" else 1 - (1 - done) ** 3)
        left = 1 - gone if config.pruning_type == "structured" else 1.0
        now = (share - gone) / left if config.pruning_type == "structured" else share
        found.append(replace(config, sparsity=now, schedule="one-shot", steps=0))
        gone = share
    return found


def apply(
    model: nn.Module, config: Config, calibration: core.Calibration | None = None
) -> nn.Module:
    """Prunes the model in place."""
    if config.pruning_type == "structured":
        return _structured(model, config, calibration)
    weights = prunable(model, config)
    share = unstructured_share(model, weights, config)
    if config.importance == "norm":
        zero_smallest(weights, share, config.allocation)
        return model
    linears = core.linears(model, config.include, config.exclude)
    most = sum(layer.weight.numel() for _, layer in linears) / sum(w.numel() for w in weights)
    if share >= most:
        raise ValueError(
            f"sparsity {share:.3g} is out of reach: importance taylor leaves convolutions whole, "
            f"so it must lie below {most:.3g}"
        )
    speech = need(calibration, "importance taylor")
    saliency.prune(model, linears, share / most, config.allocation, speech)
    return model


def prepare(
    model: nn.Module, config: Config, calibration: core.Calibration | None = None
) -> nn.Module:
    """`apply` before fine-tuning: gradual pruning begins with the first `update`."""
    if config.is_gradual:
        unstructured_share(model, prunable(model, config), config)  # raises what apply would
        return model
    return apply(model, config, calibration)


def update(config: Config, model: nn.Module, fraction: float) -> None:
    """Called before each step of fine-tuning, `fraction` of it done: gradual pruning goes on."""
    if not config.is_gradual:
        return
    weights = prunable(model, config)
    final = unstructured_share(model, weights, config)
    ramp = min(fraction / RAMP, 1.0)
    share = final * (1 - (1 - ramp) ** 3)
    zeros = sum(int((w == 0).sum()) for w in weights)
    now = zeros / sum(w.numel() for w in weights)
    if share >= now + STEP or (ramp == 1 and share > now + 1e-3):
        zero_smallest(weights, share, config.allocation)


def why_kept(model: nn.Module, name: str, config: Config) -> str:
    """Why a layer is as large as it was; "" where it was not selected."""
    part = structured.around(model, name) if config.pruning_type == "structured" else ""
    if not core.selected(part or name, config.include, config.exclude):
        return ""
    if config.pruning_type == "unstructured":
        if config.importance == "taylor" and type(model.get_submodule(name)) is not nn.Linear:
            return "importance taylor leaves it whole"
        return "too few of its weights were small enough"
    return "lost no units" if part else "not a layer that structured pruning changes"


def prunable(model: nn.Module, config: Config) -> list[Tensor]:
    """The weights of the plain Linears and convolutions that match."""
    kinds = (nn.Linear, *core.CONVOLUTIONS)
    found = core.layers(model, config.include, config.exclude, kinds)
    return [cast(Tensor, layer.weight).detach() for _, layer in found]


def unstructured_share(model: nn.Module, weights: list[Tensor], config: Config) -> float:
    """The share of zeros: what is asked for, or what makes the file as small as asked."""
    if not config.size_ratio:
        return config.sparsity
    numbers = sum(w.numel() for w in weights)
    width, whole = (2, tensor_bytes(model) / 2) if core.is_half(model) else (4, file_bytes(model))
    rest = tensor_bytes(model) * width / 4 - numbers * width
    least = rest + numbers / 8  # all zero: the masks are left
    share = 1 - (whole / config.size_ratio - least) / (numbers * width)
    if share >= 1:
        raise ValueError(
            f"size_ratio {config.size_ratio} is out of reach: with every weight zero it is "
            f"{whole / least:.1f}"
        )
    return max(share, 0.0)


def zero_smallest(weights: list[Tensor], share: float, allocation: str) -> None:
    """Sets the share of least magnitude to zero in place: of each tensor, or of all together."""
    if allocation == "layer":
        for weight in weights:
            weight[weight.abs() <= saliency.threshold(weight.abs(), share)] = 0
        return
    most = saliency.threshold(torch.cat([w.abs().flatten() for w in weights]), share)
    for weight in weights:
        weight[weight.abs() <= most] = 0


def _structured(
    model: nn.Module, config: Config, calibration: core.Calibration | None
) -> nn.Module:
    found = structured.find_groups(model, config.include, config.exclude)
    readers: dict[structured.Key, str] = {}
    moments: dict[str, Moments] = {}
    if config.refit and calibration is not None:
        readers = structured.refitted(model, found)
        moments = input_moments(model, calibration, list(readers.values()))
    if config.importance == "taylor":
        speech = need(calibration, "importance taylor")
        scores = structured.removal_importance(model, found, readers, moments, speech)
        others = {key: group for key, group in found.items() if key not in readers}
        scores |= structured.taylor_importance(model, others, speech)
    else:
        scores = structured.norm_importance(model, found)

    def counts(sparsity: float) -> dict[structured.Key, int]:
        return structured.count(found, scores, sparsity, config.allocation)

    sparsity = config.sparsity
    if config.size_ratio:
        sparsity = _sparsity_for(model, found, counts, config.size_ratio)
    return structured.prune(model, found, scores, counts(sparsity), moments)


def _sparsity_for(
    model: nn.Module, found: dict[structured.Key, structured.Group],
    counts: Callable[[float], dict[structured.Key, int]], ratio: float,
) -> float:  # fmt: skip
    """The least share of units whose removal makes the file `ratio` times smaller."""
    whole = file_bytes(model)
    wanted = whole - whole / ratio
    most = structured.smaller_by(model, found, counts(0.999))
    if most < wanted:
        raise ValueError(
            f"size_ratio {ratio} is out of reach: removing all that can be removed leaves a file "
            f"{whole / (whole - most):.2f} times smaller"
        )
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        if structured.smaller_by(model, found, counts(middle)) < wanted:
            low = middle
        else:
            high = middle
    return high
