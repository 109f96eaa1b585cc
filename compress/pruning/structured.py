"""Structured pruning: modules lose whole channels or heads and become smaller modules.

A group is a set of units of one module that can go without changing any other module: the hidden
channels of a FeedForward, the heads of an attention, the channels of a ConvModule or of one stage
of the subsampling. d_model never changes. Used by `method`.

Importance of a unit: the norm of its weights (Li et al. 2017, arXiv 1608.08710), or the first-order
Taylor estimate of what the loss rises by without it (Molchanov et al. 2019, arXiv 1906.10771), or,
where the Linear that reads the units is refitted, what is then left (`compress.pruning.removal`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.network.attention import PlainAttention, RelPositionAttention
from asr.network.model import ConvModule, FeedForward
from asr.network.subsampling import ConvSubsampling
from compress import core
from compress.allocation import tensor_bytes
from compress.calibration import (
    Moments,
    frozen,
    output_gradients,
    record_inputs,
    short,
    utterances,
)
from compress.feedback import LARGEST
from compress.pruning import removal

PRUNABLE = (FeedForward, PlainAttention, RelPositionAttention, ConvModule, ConvSubsampling)


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
    if type(module) in (PlainAttention, RelPositionAttention):
        d = args["d_head"]
        cuts = [cut for name in ("query", "key", "value") for cut in _rows(name, width=d)]
        if type(module) is RelPositionAttention:
            cuts += [Cut("position.weight", 0, width=d), Cut("bias_u", 0), Cut("bias_v", 0)]
        cuts += [Cut("out.weight", 1, width=d)]
        return [Group("heads", args["n_heads"], 1, lambda n: args | {"n_heads": n}, cuts)]
    if type(module) is ConvModule:
        turns = range(args.get("batch_norms", 1))
        norms = [f"batch_norm.{t}" for t in turns] if len(turns) > 1 else ["batch_norm"]
        parts = ("weight", "bias", "running_mean", "running_var")
        cuts = [*_rows("up", repeats=2), *_rows("depthwise")]
        cuts += [Cut(f"{norm}.{part}", 0) for norm in norms for part in parts]
        cuts += [Cut("down.weight", 1)]
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
    keys = {reader_name(key, group): key for key, group in found.items()}
    scores = {key: torch.zeros(group.units) for key, group in found.items()}
    if not found:
        return scores
    texts = [(t, int(n)) for b in calibration.batches
             for t, n in zip(b.targets, b.target_lengths, strict=True)]  # fmt: skip
    speech = utterances(calibration)
    pairs = short(list(zip(speech, texts, strict=True)), speech)
    inputs: list[tuple[str, Tensor]] = []  # several of a layer of a shared block
    with frozen(model), record_inputs(model, keys, lambda *pair: inputs.append(pair)):
        for (features, length), (target, n) in core.progress(pairs, "importance"):
            x = features[:length].unsqueeze(0).requires_grad_()
            log_probs = model(x).log_probs.transpose(0, 1)
            sizes = torch.tensor([len(log_probs)]), torch.tensor([n])
            loss = F.ctc_loss(log_probs, target[None, :n], *sizes, zero_infinity=True)
            gradients = torch.autograd.grad(loss, [read for _, read in inputs])
            factors: dict[Key, Tensor] = {}
            for (name, read), gradient in zip(inputs, gradients, strict=True):
                key = keys[name]
                features_last = isinstance(model.get_submodule(name), nn.Linear)
                cut = found[key].cuts[-1]._replace(dim=-1 if features_last else 1)
                part = _by_unit(found[key], cut, read.detach() * gradient)
                factors[key] = factors[key] + part if key in factors else part
            for key, factor in factors.items():
                scores[key] += factor.square()
            inputs.clear()
    return scores


def removal_importance(
    model: nn.Module, found: dict[Key, Group], readers: dict[Key, str],
    moments: Mapping[str, Moments], calibration: core.Calibration,
) -> dict[Key, Tensor]:  # fmt: skip
    """What removing each unit of these groups costs if its reader is refitted: (units,)."""
    scores: dict[Key, Tensor] = {}
    gradients = output_gradients(model, calibration, list(readers.values())) if readers else {}
    for key, reader in core.progress(list(readers.items()), "costs"):
        group, linear = found[key], cast(nn.Linear, model.get_submodule(reader))
        scores[key] = removal.costs(
            linear.weight, moments[reader], gradients.pop(reader), group.cuts[-1].width,
            group.multiple,
        )  # fmt: skip
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
    moments: Mapping[str, Moments],
) -> nn.Module:  # fmt: skip
    """Swaps in modules with so many units; refits those that read them whose moments are given."""
    changed = sorted(key for key, n in counts.items() if n < found[key].units)
    for key in core.progress(changed):
        group = found[key]
        keep = scores[key].topk(counts[key]).indices.sort().values
        reader = reader_name(key, group)
        if reader in moments:
            linear = cast(nn.Linear, model.get_submodule(reader))
            removal.refit(linear, group.positions(group.cuts[-1], keep), moments[reader])
        core.replace(model, key[0], shrink(model.get_submodule(key[0]), key[1], keep))
    return model


def reader_name(key: Key, group: Group) -> str:
    """The name in the model of the layer that reads a group."""
    return f"{key[0]}.{group.reader}"


def refitted(model: nn.Module, found: dict[Key, Group]) -> dict[Key, str]:
    """The names of the readers that are refitted.

    Linears are, but for those whose covariance would take minutes and gigabytes to invert. One of
    those keeps all of its kind from it, so that their importances compare.
    """
    readers = {key: reader_name(key, group) for key, group in found.items()}
    layers = {key: model.get_submodule(reader) for key, reader in readers.items()}
    left = {
        found[key].kind for key, layer in layers.items()
        if type(layer) is not nn.Linear or layer.in_features > LARGEST
    }  # fmt: skip
    return {key: reader for key, reader in readers.items() if found[key].kind not in left}
