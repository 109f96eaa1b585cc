"""What a model can learn from another one: its distributions, and the outputs of its blocks."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.network.model import ConformerCTC
from asr.network.parts import valid_mask

BLANKS = ("plain", "weighted", "removed")


def divergence(
    log_probs: Tensor, example: Tensor, lengths: Tensor, temperature: float = 1.0,
    blanks: str = "plain",
) -> Tensor:  # fmt: skip
    """Kullback-Leibler divergence from the example, summed over the valid frames of (B, T', V).

    Both softened by the temperature, and times its square, so that gradients keep their size
    (Hinton et al. 2015, arXiv 1503.02531). Most frames of CTC say little but blank. `blanks`:
    'weighted' weighs each frame by the example's share of other tokens, with a mean of 1 over the
    valid frames; 'removed' compares the distributions over those tokens, weighed in the same way.
    """
    padding = ~valid_mask(lengths, log_probs.shape[1])
    weight = None
    if blanks != "plain":
        weight = (1 - example[..., 0].exp()).masked_fill(padding, 0)  # (B, T')
        weight = weight * (lengths.sum() / weight.sum().clamp(min=1e-6))
    if blanks == "removed":
        log_probs, example = log_probs[..., 1:], example[..., 1:]
    if temperature != 1 or blanks == "removed":
        log_probs, example = (F.log_softmax(x / temperature, dim=2) for x in (log_probs, example))
    frames = (example.exp() * (example - log_probs)).sum(2).masked_fill(padding, 0)
    if weight is not None:
        frames = frames * weight
    return frames.sum() * temperature**2


class BlockOutputs:
    """From now on, `last` holds what each depth (B, T', D) gave in the model's last call.

    Of a model that merges frames, each of the `depths` behind that: at the rate of its output.
    """

    def __init__(self, model: nn.Module) -> None:
        self.last: list[Tensor] = []
        config = cast(ConformerCTC, model).config
        self.depths = config.n_layers - config.reduction_position
        blocks = cast(ConformerCTC, model).blocks[config.reduction_position :]
        self.hooks = [model.register_forward_pre_hook(lambda *_: self.last.clear())]
        self.hooks += [
            block.register_forward_hook(lambda _, __, output: self.last.append(output))
            for block in blocks
        ]

    def remove(self) -> None:
        """Leaves the model as it was."""
        for hook in self.hooks:
            hook.remove()
        self.last.clear()


def counterpart(depth: int, n_layers: int, n_teacher: int) -> int:
    """The teacher's depth that a student's corresponds to, from 0: every k-th, ending at the last.

    ceil((depth + 1) * n_teacher / n_layers) - 1.
    """
    return -(-(depth + 1) * n_teacher // n_layers) - 1


def distance(outputs: list[Tensor], examples: list[Tensor], lengths: Tensor) -> Tensor:
    """Squared error of the blocks as a share of the examples' power, summed over valid frames.

    The mean over blocks; each pair (B, T', D). Hints: Romero et al. 2015, arXiv 1412.6550.
    """
    padding = ~valid_mask(lengths, outputs[0].shape[1])

    def power(x: Tensor) -> Tensor:
        return x.float().square().mean(2).masked_fill(padding, 0).sum()

    pairs = zip(outputs, examples, strict=True)
    shares = [power(a.float() - b.float()) / power(b) for a, b in pairs]
    return torch.stack(shares).mean() * lengths.sum()


class Projections(nn.Module):
    """A Linear for each depth of a student, to the width of its teacher; none where both are equal.

    They are trained with the student and are no part of it.
    """

    def __init__(self, n_layers: int, d_model: int, d_teacher: int) -> None:
        super().__init__()
        same = d_model == d_teacher
        self.maps = nn.ModuleList(
            nn.Identity() if same else nn.Linear(d_model, d_teacher) for _ in range(n_layers)
        )

    def forward(self, outputs: list[Tensor]) -> list[Tensor]:  # (B, T', D) -> (B, T', D teacher)
        return [project(x.float()) for project, x in zip(self.maps, outputs, strict=True)]
