"""Structured pruning: modules lose whole channels or heads and become smaller modules.

A group is a set of units of one module that can go without changing any other module: the hidden
channels of a FeedForward, the heads of an attention, the channels of a ConvModule or of one stage
of the subsampling. d_model never changes. Used by `compress.pruning`.

Importance of a unit: the norm of its weights (Li et al. 2017, arXiv 1608.08710), or the first-order
Taylor estimate of what the loss rises by without it (Molchanov et al. 2019, arXiv 1906.10771). With
calibration speech, the Linear that reads the units is refitted to the outputs that it had (He et
al. 2017, arXiv 1707.06168) unless `refit` is off; importance then says how many units a group
loses, and those go whose loss the refitting makes up for best (Optimal Brain Surgeon: Hassibi &
Stork 1993).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.model import ConvModule, ConvSubsampling, FeedForward, RelPositionAttention
from compress import core
from compress.allocation import tensor_bytes
from compress.calibration import Moments, frozen, input_moments, record_inputs, short, utterances
from compress.rounding import LARGEST

PRUNABLE = (FeedForward, RelPositionAttention, ConvModule, ConvSubsampling)
STEPS = 64  # units go a 64th of those left at a time, but at least a multiple
DAMPING = 1e-3  # share of the mean variance added to each when a Linear is refitted


class Cut(NamedTuple):
    """How a tensor of the module holds the units: dimension `dim` is (repeats, units, width)."""

    tensor: str
    dim: int
    repeats: int = 1
    width: int = 1


class Group(NamedTuple):
    """Units of a module. `cuts[-1]` is the weight that reads them."""

    kind: str
    units: int
    multiple: int  # of which the number kept is to be one
    args: Callable[[int], dict[str, Any]]  # of the module, for a number of units
    cuts: list[Cut]

    @property
    def reader(self) -> str:
        """The layer that reads the units."""
        return self.cuts[-1].tensor.removesuffix(".weight")

    def positions(self, cut: Cut, keep: Tensor) -> Tensor:
        """Where the kept units (sorted) are along the cut's dimension."""
        every = torch.arange(cut.repeats * self.units * cut.width)
        return every.view(cut.repeats, self.units, cut.width)[:, keep].flatten()


def groups(module: nn.Module) -> list[Group]:
    """The groups of a module, none for a module of another kind."""
    args: dict[str, Any] = getattr(module, "args", {})
    if type(module) is FeedForward:
        cuts = [*_rows("up"), Cut("down.weight", 1)]
        return [Group("feed-forward", args["hidden"], 8, lambda n: args | {"hidden": n}, cuts)]
    if type(module) is RelPositionAttention:
        d = args["d_head"]
        cuts = [cut for name in ("query", "key", "value") for cut in _rows(name, width=d)]
        cuts += [Cut("position.weight", 0, width=d), Cut("bias_u", 0), Cut("bias_v", 0)]
        cuts += [Cut("out.weight", 1, width=d)]
        return [Group("heads", args["n_heads"], 1, lambda n: args | {"n_heads": n}, cuts)]
    if type(module) is ConvModule:
        norm = ("weight", "bias", "running_mean", "running_var")
        cuts = [*_rows("up", repeats=2), *_rows("depthwise")]
        cuts += [*(Cut(f"batch_norm.{name}", 0) for name in norm), Cut("down.weight", 1)]
        return [Group("convolution", args["channels"], 8, lambda n: args | {"channels": n}, cuts)]
    if type(module) is ConvSubsampling:
        return [_stage(module, stage) for stage in range(len(args["channels"]))]
    return []


def _rows(layer: str, repeats: int = 1, width: int = 1) -> list[Cut]:
    return [Cut(f"{layer}.{part}", 0, repeats, width) for part in ("weight", "bias")]


def _stage(module: ConvSubsampling, stage: int) -> Group:
    """The output channels of one stage of the subsampling."""
    args = module.args
    channels: list[int] = args["channels"]  # type: ignore[assignment]
    following = stage + 1
    cuts = _rows(f"{'pointwise' if args['separable'] and stage else 'convs'}.{stage}")
    if following == len(channels):
        cuts += [Cut("out.weight", 1, width=module.out.in_features // channels[-1])]
    elif args["separable"]:
        cuts += [*_rows(f"convs.{following}"), Cut(f"pointwise.{following}.weight", 1)]
    else:
        cuts += [Cut(f"convs.{following}.weight", 1)]

    def smaller(n: int) -> dict[str, Any]:
        return args | {"channels": [*channels[:stage], n, *channels[following:]]}

    return Group(f"subsampling {stage + 1}", channels[stage], 8, smaller, cuts)


Key = tuple[str, int]  # name of the module, number of the group in it


def around(model: nn.Module, layer: str) -> str:
    """The name of the prunable module that a layer is part of, "" if none."""
    parts = layer.split(".")
    names = [".".join(parts[:n]) for n in range(1, len(parts))]
    return next((name for name in names if type(model.get_submodule(name)) in PRUNABLE), "")


def find_groups(model: nn.Module, include: str, exclude: str) -> dict[Key, Group]:
    """The groups of the modules whose names match; a ValueError for none and for packed layers."""
    names = [name for name, module in model.named_modules() if type(module) in PRUNABLE]
    found: dict[Key, Group] = {}
    for name in names:
        if not core.selected(name, include, exclude):
            continue
        module = model.get_submodule(name)
        inner = [type(m).__name__ for m in module.modules() if core.is_replaced(m)]
        if inner:
            raise ValueError(
                f"{name} holds replaced layers ({inner[0]}): structured pruning comes before "
                "factorization, clustering and quantization, or starts from the float checkpoint"
            )
        found |= {(name, i): group for i, group in enumerate(groups(module))}
    if not found:
        raise core.UnchangedError(
            f"no module matches include {include!r} and exclude {exclude!r}; structured pruning "
            f"takes modules such as {', '.join(names[:4])}"
        )
    return found


def norm_importance(model: nn.Module, found: dict[Key, Group]) -> dict[Key, Tensor]:
    """The norm of each unit's matrices (units,), relative to the group's mean."""
    scores = {}
    for (name, i), group in found.items():
        state = model.get_submodule(name).state_dict()
        squares = torch.zeros(group.units)
        for cut in group.cuts:
            if state[cut.tensor].dim() > 1:
                squares += _by_unit(group, cut, state[cut.tensor].square())
        scores[name, i] = squares.sqrt() / squares.sqrt().mean()
    return scores


def taylor_importance(
    model: nn.Module, found: dict[Key, Group], calibration: core.Calibration
) -> dict[Key, Tensor]:
    """Mean square over utterances of input x gradient summed over what a unit's reader reads of it.

    That sum is the derivative of the utterance's CTC loss by a factor on the unit: (units,).
    Long utterances are passed over if there are others.
    """
    keys = {f"{key[0]}.{group.reader}": key for key, group in found.items()}
    scores = {key: torch.zeros(group.units) for key, group in found.items()}
    texts = [(t, int(n)) for b in calibration.batches
             for t, n in zip(b.targets, b.target_lengths, strict=True)]  # fmt: skip
    speech = utterances(calibration)
    pairs = short(list(zip(speech, texts, strict=True)), speech)
    inputs: dict[str, Tensor] = {}
    with frozen(model), record_inputs(model, keys, inputs.__setitem__):
        for (features, length), (target, n) in core.progress(pairs, "importance"):
            x = features[:length].unsqueeze(0).requires_grad_()
            log_probs = model(x).log_probs.transpose(0, 1)
            sizes = torch.tensor([len(log_probs)]), torch.tensor([n])
            loss = F.ctc_loss(log_probs, target[None, :n], *sizes, zero_infinity=True)
            gradients = torch.autograd.grad(loss, list(inputs.values()))
            for (name, read), gradient in zip(inputs.items(), gradients, strict=True):
                group = found[keys[name]]
                features_last = isinstance(model.get_submodule(name), nn.Linear)
                cut = group.cuts[-1]._replace(dim=-1 if features_last else 1)
                scores[keys[name]] += _by_unit(group, cut, read.detach() * gradient).square()
            inputs.clear()
    return scores


def _by_unit(group: Group, cut: Cut, values: Tensor) -> Tensor:
    """Sums of a tensor's values by unit: (units,)."""
    along = values.movedim(cut.dim, 0).flatten(1).sum(1) if values.dim() > 1 else values
    return along.view(cut.repeats, group.units, cut.width).sum((0, 2))


def count(
    found: dict[Key, Group], scores: dict[Key, Tensor], sparsity: float, allocation: str
) -> dict[Key, int]:
    """How many units of each group stay.

    'layer': the same share of every group, to the nearest multiple (at least one). 'global': the
    share is of all units of one kind, and the multiples of least importance go first. Heads are
    whole: 30 % of 4 is one head of every attention, or 30 % of the heads of all.
    """
    if allocation == "layer":
        return {key: _rounded(group, sparsity) for key, group in found.items()}
    counts: dict[Key, int] = {}
    for kind in {group.kind for group in found.values()}:
        of_kind = {key: group for key, group in found.items() if group.kind == kind}
        counts |= _global_counts(of_kind, scores, sparsity)
    return counts


def _rounded(group: Group, sparsity: float) -> int:
    """How many units stay."""
    if sparsity == 0:
        return group.units
    multiple = group.multiple
    return min(max(round(group.units * (1 - sparsity) / multiple), 1) * multiple, group.units)


def _global_counts(
    found: dict[Key, Group], scores: dict[Key, Tensor], sparsity: float
) -> dict[Key, int]:
    """How many units of each group stay if all groups compete."""
    pieces: list[tuple[float, Key, int]] = []  # importance a unit, whose, how many units
    for key, group in found.items():
        ascending = scores[key].sort().values
        first = group.units % group.multiple or group.multiple
        start, size = 0, first
        while start + size < group.units:  # the last multiple always stays
            pieces.append((float(ascending[start : start + size].mean()), key, size))
            start, size = start + size, group.multiple
    counts = {key: group.units for key, group in found.items()}
    left = round(sparsity * sum(counts.values()))
    for _, key, size in sorted(pieces):
        if size <= 2 * left:  # to the nearest multiple
            counts[key] -= size
            left -= size
    return counts


def shrink(module: nn.Module, number: int, keep: Tensor) -> nn.Module:
    """A module of the same class with only the kept units of a group."""
    group = groups(module)[number]
    state = module.state_dict()
    for cut in group.cuts:
        index = group.positions(cut, keep).to(state[cut.tensor].device)
        state[cut.tensor] = state[cut.tensor].index_select(cut.dim, index).clone()
    with torch.device("meta"):
        smaller = type(module)(**group.args(len(keep)))
    smaller.load_state_dict(state, assign=True)
    return smaller.requires_grad_().train(module.training)


def smaller_by(model: nn.Module, found: dict[Key, Group], counts: dict[Key, int]) -> int:
    """Bytes that removing all but so many units saves."""
    saved = 0
    for name in {name for name, _ in found}:
        module = model.get_submodule(name)
        with torch.device("meta"):
            smaller = module
            for number in range(len(groups(module))):
                smaller = type(module)(**groups(smaller)[number].args(counts[name, number]))
        saved += tensor_bytes(module) - tensor_bytes(smaller)
    return saved


def prune(
    model: nn.Module, found: dict[Key, Group], scores: dict[Key, Tensor], counts: dict[Key, int],
    calibration: core.Calibration | None,
) -> nn.Module:  # fmt: skip
    """Swaps in modules with so many units; with calibration speech, refits what reads them."""
    changed = sorted(key for key, n in counts.items() if n < found[key].units)
    readers = {key: f"{key[0]}.{found[key].reader}" for key in changed}
    moments: dict[str, Moments] = {}
    if calibration is not None:
        fitted = {r for r in readers.values() if is_refitted(model.get_submodule(r))}
        moments = input_moments(model, calibration, sorted(fitted))
    for key in core.progress(changed):
        group, reader = found[key], readers[key]
        if reader in moments:
            linear = cast(nn.Linear, model.get_submodule(reader))
            keep = spared(linear.weight.detach(), moments[reader], group, counts[key])
            refit(linear, group.positions(group.cuts[-1], keep), moments.pop(reader))
        else:
            keep = scores[key].topk(counts[key]).indices.sort().values
        core.replace(model, key[0], shrink(model.get_submodule(key[0]), key[1], keep))
    return model


def is_refitted(reader: nn.Module) -> bool:
    """Linears are, but for those whose covariance would take minutes and gigabytes to invert."""
    return type(reader) is nn.Linear and reader.in_features <= LARGEST


def damped(moments: Moments) -> Tensor:
    """The covariance (in, in) in float64, made invertible."""
    covariance = moments.covariance.double()
    damping = DAMPING * float(covariance.diagonal().mean()) + 1e-12
    return covariance + damping * torch.eye(len(covariance))


def spared(weight: Tensor, moments: Moments, group: Group, count: int) -> Tensor:
    """The units (sorted) that stay if those go whose removal costs the refitted outputs least.

    Removing the inputs R of a Linear W costs W_R (S_RR)^-1 W_R', S the inverse covariance. They go
    a multiple at a time (of a wide layer several), and what the rest takes over is counted before
    the next.
    """
    inverse = torch.linalg.inv(damped(moments))
    w = weight.double()
    units = torch.arange(group.units)
    width = group.cuts[-1].width
    while len(units) > count:
        blocks = inverse.view(len(units), width, len(units), width)
        own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (units, width, width)
        columns = w.view(len(w), len(units), width).permute(1, 2, 0)  # (units, width, out)
        costs = (columns * torch.linalg.solve(own, columns)).sum((1, 2))
        step = max(len(units) // STEPS // group.multiple, 1) * group.multiple
        number = min(step, len(units) - count)
        gone = torch.zeros(len(units), dtype=torch.bool)
        gone[costs.topk(number, largest=False).indices] = True
        wide = gone.repeat_interleave(width)
        part = torch.linalg.solve(inverse[wide][:, wide], inverse[wide][:, ~wide])
        w = w[:, ~wide] - w[:, wide] @ part
        inverse = inverse[~wide][:, ~wide] - inverse[~wide][:, wide] @ part
        units = units[~gone]
    return units


def refit(linear: nn.Linear, keep: Tensor, moments: Moments) -> None:
    """Changes the weights of the kept inputs and the bias so that they make up for the others."""
    covariance = damped(moments)
    weight = linear.weight.detach().double()
    fitted = weight @ torch.linalg.solve(covariance[keep][:, keep], covariance[keep]).t()
    with torch.no_grad():
        lost = weight @ moments.mean.double() - fitted @ moments.mean[keep].double()
        linear.weight[:, keep] = fitted.float()  # (out, kept)
        linear.bias.add_(lost.float())
