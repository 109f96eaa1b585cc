"""Low-rank factorization: a Linear becomes two thinner ones, W about up @ down.

Plain: the truncated singular value decomposition, the nearest matrix of its rank (Eckart & Young
1936). `activation_aware`: the nearest in what the model answers to calibration speech. An error D
of the weights costs trace(G D C D'): C is the covariance of the layer's inputs, their mean goes
into the bias (as in LiteASR, arXiv 2502.20583), and G says what hangs on its outputs, by gradients
(`output_gradients`). Without one rank for all, the ranks of the layers are chosen together:
`size_ratio` loses the least in all that fits the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from compress import core
from compress.allocation import allocate, file_bytes, tensor_bytes
from compress.calibration import Moments, input_moments, need, output_gradients

DAMPING = 1e-3  # share of the mean variance added to each, where speech shows too little
MULTIPLE = 8  # of chosen ranks
MAP_ENTRY = 200  # bytes that a file spends on a layer being replaced


@dataclass(frozen=True)
class Config(core.Selection):
    """Options of factorization: one of rank, energy and size_ratio."""

    rank: int = field(default=0, metadata={"help": "rank of every layer", "above": 0})
    energy: float = field(
        default=0.0,
        metadata={"help": "share of each layer's squared singular values to keep", "above": 0},
    )
    size_ratio: float = field(
        default=0.0, metadata={"help": "how many times smaller the file is to be", "above": 1}
    )
    activation_aware: bool = field(
        default=False, metadata={"help": "nearest answers to calibration speech, not weights"}
    )

    def __post_init__(self) -> None:
        if sum(bool(value) for value in (self.rank, self.energy, self.size_ratio)) != 1:
            raise ValueError("factorization takes one of rank, energy and size_ratio")
        if self.rank < 0:
            raise ValueError(f"rank {self.rank} must be at least 1")
        if not 0 <= self.energy <= 1:
            raise ValueError(f"energy {self.energy} must lie in (0, 1]")
        if self.size_ratio and self.size_ratio <= 1:
            raise ValueError(f"size_ratio {self.size_ratio} must be above 1")

    @property
    def needs_calibration(self) -> bool:
        return self.activation_aware


class LowRankLinear(nn.Module):
    """y = x @ down.T @ up.T + bias: two ordinary Linears, in -> rank -> out."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.args = {
            "in_features": in_features, "out_features": out_features, "rank": rank, "bias": bias,
        }  # fmt: skip
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int, components: Components | None = None
    ) -> LowRankLinear:
        """The nearest one; by default in its weights. The two factors get equal norms."""
        components = components or principal_components(linear.weight.detach())
        up, down = components.up[:, :rank], components.down[:rank]
        layer = cls(linear.in_features, linear.out_features, rank, linear.bias is not None)
        with torch.no_grad():
            if linear.bias is not None:
                lost = components.up[:, rank:] @ components.mean[rank:]
                layer.up.bias.copy_(linear.bias + lost)
            scale = (up.norm(dim=0) / down.norm(dim=1).clamp(min=1e-12)).sqrt().clamp(min=1e-12)
            layer.down.weight.copy_(down * scale.unsqueeze(1))
            layer.up.weight.copy_(up / scale)
        return layer

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        result: Tensor = self.up(self.down(x))
        return result

    def extra_repr(self) -> str:
        return f"{self.args['in_features']}, {self.args['out_features']}, rank {self.args['rank']}"


class Components(NamedTuple):
    """A weight (out, in) as up @ down, the most important of the k = min(in, out) parts first.

    `energy` (k,) is what leaving a part out costs. `mean` (k,) of what the parts take from the
    inputs, down @ x: the bias takes it over for those that are left out.
    """

    up: Tensor  # (out, k)
    down: Tensor  # (k, in)
    energy: Tensor
    mean: Tensor


def principal_components(
    weight: Tensor, inputs: Tensor | None = None, outputs: Tensor | None = None,
    mean: Tensor | None = None,
) -> Components:  # fmt: skip
    """The parts that leave, for every rank, the least trace(G D C D') of the error D.

    Both are given on the thin side of the weight, (k, k), which is all they are needed for:
    `inputs` is C, or W C W' where outputs are fewer than inputs; `outputs` is W' G W, or G there.
    `mean` (k,) is that of the inputs, or W times it. Without them C and G are the identity: then
    these are the singular vectors.
    """
    wide = len(weight) > weight.shape[1]
    w = weight.double().t() if wide else weight.double()  # (k, n)
    metric, spread = (inputs, outputs) if wide else (outputs, inputs)
    root = _root(metric, len(w))  # metric = R R'
    spread = w @ w.t() if spread is None else spread.double()
    energy, vectors = torch.linalg.eigh(root.t() @ spread @ root)
    first = torch.linalg.solve_triangular(root.t(), vectors, upper=True)  # (k, k)
    second = vectors.t() @ root.t()  # (k, k): its inverse
    up, down = ((second @ w).t(), first.t()) if wide else (first, second @ w)
    mean = torch.zeros(len(w)) if mean is None else mean
    taken = (first.t() if wide else second) @ mean.double()
    parts = up.flip(1), down.flip(0), energy.flip(0).clamp(min=0), taken.flip(0)
    return Components(*(part.float() for part in parts))


def _root(gram: Tensor | None, size: int) -> Tensor:
    """The lower triangle whose product with its transpose is the damped (size, size) matrix."""
    if gram is None:
        return torch.eye(size, dtype=torch.float64)
    gram = gram.double()
    damping = DAMPING * float(gram.diagonal().mean()) + 1e-12
    lower, failed = torch.linalg.cholesky_ex(gram + damping * torch.eye(size, dtype=torch.float64))
    if failed:  # rounding has left it indefinite
        values, vectors = torch.linalg.eigh(gram)
        root = vectors * values.clamp(min=damping).sqrt()
        lower = torch.linalg.qr(root.t()).R.t()
    return lower


def useful_rank(linear: nn.Linear) -> int:
    """The largest rank that makes a Linear smaller; 0 if none does."""
    m, n = linear.weight.shape
    return (m * n - 1) // (m + n)


def apply(
    model: nn.Module, config: Config, calibration: core.Calibration | None = None
) -> nn.Module:
    """Replaces the Linears that become smaller by `LowRankLinear`, keeps the others and says so."""
    chosen = core.linears(model, config.include, config.exclude)
    name, most = max(((n, useful_rank(layer)) for n, layer in chosen), key=lambda item: item[1])
    limit = f"the largest useful rank is {most} ({name})"
    if config.rank > most:
        raise core.UnchangedError(f"rank {config.rank} makes no layer smaller: {limit}")
    moments: dict[str, Moments] = {}
    gradients: dict[str, Tensor] = {}
    if config.activation_aware:
        calibration = need(calibration, "activation_aware")
        names = [name for name, _ in chosen]
        weights = {name: layer.weight.detach() for name, layer in chosen}
        wide = {name: w for name, w in weights.items() if len(w) > w.shape[1]}
        thin = {name: w.t() for name, w in weights.items() if name not in wide}
        moments = input_moments(model, calibration, names, maps=thin)
        gradients = output_gradients(model, calibration, names, maps=wide)
    parts = {
        name: components(layer, moments.pop(name, None), gradients.pop(name, None))
        for name, layer in core.progress(chosen)
    }
    ranks = choose_ranks(model, chosen, parts, config)
    if not any(rank <= useful_rank(layer) for (_, layer), rank in zip(chosen, ranks, strict=True)):
        raise core.UnchangedError(
            f"energy {config.energy} makes no layer smaller: {limit}; lower it"
        )
    for (name, layer), rank in zip(chosen, ranks, strict=True):
        if rank <= useful_rank(layer):
            core.replace(model, name, LowRankLinear.from_linear(layer, rank, parts.pop(name)))
        else:
            core.keep(layer, f"smaller only below rank {useful_rank(layer) + 1}")
    return model


def components(linear: nn.Linear, moments: Moments | None, gradients: Tensor | None) -> Components:
    """The parts of a layer's weight by what calibration speech says of it, if it does."""
    weight = linear.weight.detach()
    if moments is None:
        return principal_components(weight)
    if linear.bias is None:  # nothing takes over the mean
        return principal_components(weight, moments.gram, gradients)
    return principal_components(weight, moments.covariance, gradients, moments.mean)


def choose_ranks(
    model: nn.Module, chosen: list[tuple[str, nn.Linear]], parts: dict[str, Components],
    config: Config,
) -> list[int]:  # fmt: skip
    """The rank of each layer; one above `useful_rank` leaves it whole."""
    if config.rank:
        return [config.rank] * len(chosen)
    energies = [parts[name].energy.double().numpy() for name, _ in chosen]
    if config.energy:
        kept = [np.cumsum(e) / e.sum() for e in energies]
        return [_rounded(int(np.searchsorted(k, config.energy - 1e-9)) + 1) for k in kept]
    options, sizes, losses = [], [], []
    if not config.activation_aware:  # energies of different layers do not compare
        energies = [e / e.sum() for e in energies]
    for (_, layer), energy in zip(chosen, energies, strict=True):
        most = useful_rank(layer)
        ranks = [r for r in range(1, most + 1) if r % MULTIPLE == 0 or most < MULTIPLE]
        rest = energy.sum() - np.cumsum(energy)
        out, inside = layer.weight.shape
        options.append([*ranks, most + 1])
        weights = [*(r * (out + inside) for r in ranks), out * inside]
        sizes.append(4.0 * np.array(weights) + [*(MAP_ENTRY for _ in ranks), 0])
        losses.append(np.array([*(rest[r - 1] for r in ranks), 0.0]))
    whole = file_bytes(model)
    fixed = tensor_bytes(model) - sum(layer.weight.nbytes for _, layer in chosen)
    try:
        choice = allocate(sizes, losses, whole / config.size_ratio - fixed)
    except ValueError:
        smallest = fixed + sum(s.min() for s in sizes)
        raise ValueError(
            f"size_ratio {config.size_ratio} is out of reach: with the lowest ranks in these "
            f"{len(chosen)} layers it is {whole / smallest:.2f}"
        ) from None
    return [ranks[j] for ranks, j in zip(options, choice, strict=True)]


def _rounded(rank: int) -> int:
    """The next multiple of 8, small ranks as they are."""
    return rank if rank < MULTIPLE else -(-rank // MULTIPLE) * MULTIPLE
