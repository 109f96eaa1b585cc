"""What a model hears of dev data: greedy texts and their error rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asr.common.metrics import error_rates
from asr.network.processes import share, take_buffers_of_first
from asr.runtime.decoding import greedy_decode, greedy_decode_batch
from asr.runtime.tokenizer import Tokenizer
from asr.training.data import BatchDataset, Key, make_loader, plain_batches


@dataclass(frozen=True)
class Heard:
    """Error rates (as `error_rates` gives them) by set, and the texts in the order of the data."""

    sets: dict[str, dict[str, Any]]
    references: list[str]
    texts: list[str]

    @property
    def wer(self) -> float:
        """Of several sets the mean, so that a small one counts as much as a large one."""
        return sum(rates["wer"] for rates in self.sets.values()) / len(self.sets)

    @property
    def cer(self) -> float:
        return sum(rates["cer"] for rates in self.sets.values()) / len(self.sets)

    @property
    def silent(self) -> bool:
        """Whether nearly every word is missing."""
        words, gone = (sum(r[k] for r in self.sets.values()) for k in ("words", "deletions"))
        return bool(gone > 0.95 * words)

    def entry(self) -> dict[str, float]:
        """For the log."""
        found = {"dev_wer": round(self.wer, 5), "dev_cer": round(self.cer, 5)}
        if len(self.sets) > 1:
            found |= {f"dev_wer/{name}": round(r["wer"], 5) for name, r in self.sets.items()}
        return found

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {r['wer']:.2%}" for name, r in self.sets.items())
        several = f" ({parts})" if len(self.sets) > 1 else ""
        return f"dev WER {self.wer:.2%}{several}  CER {self.cer:.2%}"


def listen(
    model: nn.Module, dataset: BatchDataset, tokenizer: Tokenizer, num_workers: int = 0
) -> Heard:
    """The model on all utterances, in float32 and eval mode; as evaluate.py would hear them.

    Each process hears its share of them. In batches, but one utterance at a time where batch mates
    and padding would change what the model says: dynamic int8 activations have one scale a call.
    """
    take_buffers_of_first(model)
    if any(getattr(module, "one_at_a_time", False) for module in model.modules()):
        texts = transcribe_alone(model, dataset, tokenizer)
    else:
        texts = transcribe_batches(model, dataset, tokenizer, num_workers)
    references = [u.text for u in dataset.utterances]
    sets = {}
    for name in dict.fromkeys(u.corpus for u in dataset.utterances):
        own = [i for i, u in enumerate(dataset.utterances) if u.corpus == name]
        sets[name] = error_rates([references[i] for i in own], [texts[i] for i in own])
    return Heard(sets, references, texts)


@torch.no_grad()
def transcribe_batches(
    model: nn.Module, dataset: BatchDataset, tokenizer: Tokenizer, num_workers: int = 0
) -> list[str]:
    """Greedy texts of the dataset's utterances, in the dataset's order."""
    device = next(model.parameters()).device
    model.eval()

    def hear(keys: Sequence[Key]) -> list[dict[int, str]]:
        found = []
        for batch in make_loader(dataset, keys, num_workers):
            output = model(batch.features.to(device), batch.feature_lengths.to(device))
            ids = greedy_decode_batch(output.log_probs.cpu().numpy(), output.lengths.cpu().numpy())
            said = map(tokenizer.decode, ids)
            found.append(dict(zip(batch.indices, said, strict=True)))
        return found

    parts = share(list(plain_batches(dataset.utterances, 32, 120.0)), hear)
    texts = {i: text for part in parts for i, text in part.items()}
    return [texts[i] for i in range(len(dataset.utterances))]


@torch.no_grad()
def transcribe_alone(model: nn.Module, dataset: BatchDataset, tokenizer: Tokenizer) -> list[str]:
    """Greedy texts of the dataset's utterances, each run by itself and without padding."""
    device = next(model.parameters()).device
    model.eval()

    def hear(i: int) -> str:
        batch = dataset[0, False, (i,)]
        features = batch.features[:, : int(batch.feature_lengths)].to(device)
        output = model(features, batch.feature_lengths.to(device))
        return tokenizer.decode(greedy_decode(output.log_probs[0].cpu().numpy()))

    return share(range(len(dataset.utterances)), lambda part: [hear(i) for i in part])
