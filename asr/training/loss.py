"""The CTC loss, with intermediate CTC (Lee & Watanabe 2021)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from asr.network.model import Output
from asr.runtime.features import subsampled_length
from asr.training.data import Batch

# What a step minimises: the sum over a batch's utterances, given what the model said and the
# features (B, T, n_mels) and their lengths (B,) that it heard, on its device.
Objective = Callable[[Output, Batch, Tensor, Tensor], Tensor]


def ctc_loss(output: Output, batch: Batch, factor: int, intermediate_weight: float) -> Tensor:
    """Sum of the utterances' CTC losses, float32; impossible targets count as 0.

    Lengths come from the batch, on the host: the loss never waits for a GPU to report them.
    """
    lengths = subsampled_length(batch.feature_lengths, factor)

    def one(log_probs: Tensor) -> Tensor:
        return F.ctc_loss(
            log_probs.transpose(0, 1), batch.targets, lengths, batch.target_lengths,
            blank=0, reduction="sum", zero_infinity=True,
        )  # fmt: skip

    loss = one(output.log_probs)
    if not output.intermediate:
        return loss
    extra = sum((one(x) for x in output.intermediate), torch.zeros_like(loss))
    share = intermediate_weight / len(output.intermediate)
    return (1 - intermediate_weight) * loss + share * extra
