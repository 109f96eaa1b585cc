"""What a model can learn from another one: its distributions, and the outputs of its blocks."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from asr.network.model import ConformerCTC, valid_mask


def divergence(log_probs: Tensor, example: Tensor, lengths: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the example, summed over the valid frames of (B, T', V).

    Hinton et al. 2015, arXiv 1503.02531.
    """
    frames = (example.exp() * (example - log_probs)).sum(2)
    return frames.masked_fill(~valid_mask(lengths, frames.shape[1]), 0).sum()


class BlockOutputs:
    """From now on, `last` holds what each block (B, T', D) gave in the model's last call."""

    def __init__(self, model: nn.Module) -> None:
        self.last: list[Tensor] = []
        blocks = cast(ConformerCTC, model).blocks
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
