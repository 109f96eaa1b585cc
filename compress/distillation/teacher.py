"""Who teaches: models in torch, or .onnx files; several are one by the mean of what they say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from asr.network.checkpoint import Checkpoint, load_checkpoint
from asr.network.device import autocast
from asr.runtime.config import FeatureConfig, config_to_dict
from asr.runtime.recognizer import Recognizer, load


@dataclass(frozen=True)
class Teacher:
    """A model, and what tells it from others."""

    name: str
    source: nn.Module | Recognizer
    digest: str


def load_teachers(paths: str, given: Checkpoint) -> list[Teacher]:
    """Those named, with commas between, or with "" the model given.

    Raises ValueError where tokens, features or frame rate are not those of the model given.
    """
    if not paths.strip():
        return [Teacher("the model given", given.model, fingerprint(given.model))]
    return [load_teacher(path.strip(), given) for path in paths.split(",") if path.strip()]


def load_teacher(path: str, given: Checkpoint) -> Teacher:
    if path.endswith(".onnx"):
        recognizer = load(path)
        info = recognizer.info
        check_alike(path, info.tokens, info.features, info.subsampling_factor, given)
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        return Teacher(path, recognizer, digest)
    checkpoint = load_checkpoint(path)
    model = checkpoint.model
    tokens, factor = checkpoint.tokenizer.tokens, model.config.total_factor
    check_alike(path, tokens, checkpoint.features, factor, given)
    return Teacher(path, model, fingerprint(model))


def check_alike(
    path: str, tokens: Sequence[str], features: FeatureConfig, factor: int, given: Checkpoint
) -> None:
    """Raises ValueError, with what differs, where a teacher's frames cannot be learnt from."""
    differences = []
    theirs, ours = list(tokens), given.tokenizer.tokens
    if theirs != ours:
        odd = sorted(set(theirs) ^ set(ours))[:4]
        detail = f", for example {' '.join(map(repr, odd))}" if odd else " in another order"
        differences.append(f"tokens ({len(theirs)}, not {len(ours)}{detail})")
    wanted_features = config_to_dict(given.features)
    for key, value in config_to_dict(features).items():
        wanted = wanted_features[key]
        if value != wanted:
            differences.append(f"features ({key} {value}, not {wanted})")
    student = given.model.config.total_factor
    if factor != student:
        differences.append(f"frame rate (one of {factor} frames, not of {student})")
    if differences:
        raise ValueError(f"teacher {path} differs from the student in {'; '.join(differences)}")


def fingerprint(model: nn.Module) -> str:
    """Tells the weights of models apart."""
    found = hashlib.sha256(json.dumps(config_to_dict(model.config), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def answers(
    teachers: Sequence[Teacher], features: Tensor, lengths: Tensor, frames: int, precision: str
) -> Tensor:
    """The mean of what they say, as log-probabilities (B, T', V) on the features' device.

    features (B, T, n_mels), lengths (B,); `frames` is T'. Padding frames hold anything finite.
    """
    found = [one_answer(t.source, features, lengths, frames, precision) for t in teachers]
    if len(found) == 1:
        return found[0]
    return torch.logsumexp(torch.stack(found), dim=0) - torch.tensor(float(len(found))).log()


@torch.no_grad()
def one_answer(
    source: nn.Module | Recognizer, features: Tensor, lengths: Tensor, frames: int, precision: str
) -> Tensor:
    if isinstance(source, nn.Module):
        with autocast(features.device, precision):
            output: Tensor = source(features, lengths).log_probs
        return output
    heard = [x[:n].cpu().numpy() for x, n in zip(features, lengths.tolist(), strict=True)]
    said = [torch.from_numpy(x) for x in source.log_probs(heard)]
    padded = torch.zeros(len(said), frames, said[0].shape[1])
    for row, x in zip(padded, said, strict=True):
        row[: len(x)] = x
    return padded.to(features.device)
