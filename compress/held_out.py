"""Whether fine-tuning has helped: what held-out speech says of a model with and without it."""

from __future__ import annotations

from torch import nn

from asr.network.checkpoint import Checkpoint
from asr.network.processes import is_first
from asr.training.data import BatchDataset
from asr.training.dev import listen
from compress.finetuning import Options, data


def untrained_is_better(
    untrained: nn.Module, trained: nn.Module, checkpoint: Checkpoint, options: Options
) -> bool:
    """Whether the dev data of fine-tuning is heard better without it: by WER, then CER. Says so."""
    _, dev = data(checkpoint, options)
    if not dev:
        return False
    dataset = BatchDataset(dev, checkpoint.tokenizer, checkpoint.features)
    before, after = (listen(m, dataset, checkpoint.tokenizer) for m in (untrained, trained))
    better = (before.wer, before.cer) < (after.wer, after.cer)
    if is_first():
        kept = "without" if better else "with"
        print(f"held out: without fine-tuning {before}; after it {after}; kept: {kept}", flush=True)
    return better
