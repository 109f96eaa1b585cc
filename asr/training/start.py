"""What a run starts from: a fresh model, a checkpoint's, or its own last state; and on which data.

`wanted` are the settings of the model and its tokens by their flags' names, those given alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asr.corpus.manifest import Utterance
from asr.corpus.splits import places
from asr.network.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from asr.network.model import ConformerCTC
from asr.runtime.cli import int_list, yes_no
from asr.runtime.config import PRESETS, FeatureConfig, ModelConfig, preset
from asr.runtime.tokenizer import ENGLISH, Tokenizer
from asr.training.data import FRONT_RATE, drop_impossible, is_hidden
from asr.training.train_config import BATCHES, TrainConfig

Say = Callable[[str], None]

DIMENSIONS: dict[str, tuple[Any, str]] = {
    "d_model": (int, "width: numbers in the vector of a frame"),
    "n_layers": (int, "depth: Conformer blocks"),
    "n_heads": (int, "heads of the attention; must divide d_model"),
    "ff_expansion": (int, "how many times wider the feed-forward modules are inside"),
    "conv_kernel_size": (int, "frames that a convolution module sees; odd"),
    "subsampling": (str, "convolutions before the blocks: striding, or the lighter dw_striding"),
    "subsampling_factor": (int, "input frames (10 ms) to one of the blocks: 2, 4 or 8"),
    "subsampling_channels": (int, "channels of those convolutions"),
    "reduction_position": (int, "so many blocks first, then neighbouring frames become one"),
    "reduction_factor": (int, "how many: 2 or 4; 1 for no reduction"),
    "reduction_d_model": (int, "width of the blocks after it; 0 for d_model"),
    "plain_blocks": (int, "so many first blocks attend without relative positions"),
    "dropout": (float, "share of activations zeroed in training"),
    "intermediate_layers": (
        int_list, "blocks with a CTC loss of their own, such as 4,8; '' for none"
    ),
    "self_conditioned": (yes_no, "true: blocks after those also see what they read so far"),
    "share_layers": (int, "blocks stored, used in turn at every depth; 0: one for each"),
    "own_norms": (yes_no, "true: shared blocks have LayerNorms for each depth"),
}  # fmt: skip
WANTED = (*DIMENSIONS, "preset", "tokenizer", "vocab_size", "alphabet")
PRUNED = 0.01  # share of zeros among the weights from which on a model counts as pruned


def make_tokenizer(wanted: Mapping[str, Any], train_set: Sequence[Utterance]) -> Tokenizer:
    """Characters, or pieces of the training texts."""
    kind, alphabet = wanted.get("tokenizer", "char"), wanted.get("alphabet")
    if kind not in ("char", "bpe"):
        raise ValueError(f"--tokenizer {kind!r} is not one of char, bpe")
    if kind == "bpe" and alphabet:
        raise ValueError("--alphabet is for --tokenizer char; bpe takes its from the texts")
    if kind != "bpe" and wanted.get("vocab_size"):
        raise ValueError(f"--vocab_size {wanted['vocab_size']} is for --tokenizer bpe")
    if kind == "bpe":
        return Tokenizer.bpe((u.text for u in train_set), wanted.get("vocab_size") or 128)
    if alphabet == "auto":
        return Tokenizer.characters_of(u.text for u in train_set)
    return Tokenizer.characters(alphabet or ENGLISH)


def new_checkpoint(
    wanted: Mapping[str, Any], train_set: Sequence[Utterance], data: str | list[str], seed: int
) -> Checkpoint:
    """A fresh model and tokenizer."""
    tokenizer = make_tokenizer(wanted, train_set)
    model_config: ModelConfig = preset(
        wanted.get("preset", "small"), vocab_size=len(tokenizer), **dimensions(wanted)
    )
    torch.manual_seed(seed)
    return Checkpoint(ConformerCTC(model_config), tokenizer, FeatureConfig(), {"train": data})


def dimensions(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The dimensions that were given; with n_layers alone, the intermediate CTC is half-way."""
    given = {name: wanted[name] for name in DIMENSIONS if name in wanted}
    if "n_layers" in given and "intermediate_layers" not in given:
        n_layers = given["n_layers"]
        given["intermediate_layers"] = (n_layers // 2,) if n_layers > 1 else ()
    return given


def start_from(path: str | Path, say: Say = print) -> Checkpoint:
    """The model of a checkpoint to fine-tune; its history names the file by its digest.

    Of a last.pt, the history has the unfinished run as well. A ValueError for packed weights.
    """
    checkpoint = load_checkpoint(path)
    check_trainable(checkpoint.model, path)
    share = zero_share(checkpoint.model)
    if share >= PRUNED:
        say(
            f"note: {share:.0%} of the weights in {path} are zero, and training fills them again; "
            "compress.py --method pruning --fine_tune_epochs N trains and keeps them zero"
        )
    if checkpoint.training:
        run = {key: checkpoint.training[key] for key in ("config", "epoch")}
        checkpoint.history.append({"step": "train", **run})
        checkpoint.training = None
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    checkpoint.history.append({"step": "init", "sha256": digest})
    return checkpoint


def renew_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer, seed: int) -> None:
    """Gives the model other tokens, hence a fresh output layer; in place."""
    torch.manual_seed(seed)
    model, old = checkpoint.model, checkpoint.model.config
    width = model.head.in_features
    model.config = replace(old, vocab_size=len(tokenizer))
    model.head = nn.Linear(width, len(tokenizer))
    if old.self_conditioned:
        model.conditioning = nn.Linear(len(tokenizer), width)
    checkpoint.tokenizer = tokenizer
    checkpoint.history[-1]["new_tokens"] = len(tokenizer)


def check_trainable(model: ConformerCTC, path: str | Path) -> None:
    """A ValueError where weights are integers (quantised, clustered): no step could move them."""
    packed = [
        name for name, module in model.named_modules()
        if not {"qweight", "indices"}.isdisjoint(dict(module.named_buffers(recurse=False)))
    ]  # fmt: skip
    if packed:
        raise ValueError(
            f"{path}: {len(packed)} layers are packed as integers ({packed[0]}, …) and cannot be "
            "trained; start from the float checkpoint that it was made of, and compress the result "
            "(compress.py has --fine_tune_epochs to train while it compresses)"
        )


def zero_share(model: ConformerCTC) -> float:
    """The share of zeros among the weights of matrices and convolutions."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / max(1, sum(weight.numel() for weight in weights))


def resume_from(path: Path, config: TrainConfig) -> Checkpoint:
    """The state of an interrupted run; a ValueError where it is none, or one of other settings."""
    checkpoint = load_checkpoint(path)
    if checkpoint.training is None:
        raise CheckpointError(f"{path}: holds no resume state")
    check_same_run(checkpoint.training["config"], config, str(path))
    return checkpoint


def check_same_run(saved: dict[str, Any], config: TrainConfig, where: str) -> None:
    """Resuming with other settings would not be the same run.

    Another device or number of threads is: it only adds in another order. More epochs than first
    planned are, and the front may be frozen for longer or learn faster. Batches may have another
    size, which memory may ask for: the epoch then begins again.
    """
    free = {
        *BATCHES,
        "num_workers", "log_every", "save_every", "tensorboard", "device", "patience", "threads",
        "epochs", "freeze_epochs", "front_rate",
    }  # fmt: skip
    now = vars(config)
    other = [f"--{k} {v}" for k, v in saved.items() if k not in free and v != now.get(k, v)]
    if other:
        raise ValueError(
            f"{where}: was trained with {' '.join(other)}; give the same to resume, or start anew "
            "from its model with --init_from"
        )


def check_same_model(wanted: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """With --init_from or --resume the model is there: a flag that wants another is a mistake."""
    config, tokenizer = checkpoint.model.config, checkpoint.tokenizer
    flags = (*DIMENSIONS, "tokenizer", "vocab_size")
    given = {name: wanted[name] for name in flags if wanted.get(name) is not None}
    if wanted.get("alphabet") not in (None, "auto"):
        given["alphabet"] = "".join(Tokenizer.characters(wanted["alphabet"]).tokens[2:])
    of_preset = PRESETS.get(wanted.get("preset", ""), {})
    of_preset = of_preset and of_preset | dimensions(wanted)
    there = vars(config) | {
        "tokenizer": "bpe" if tokenizer.sentencepiece_model else "char",
        "alphabet": "".join(tokenizer.tokens[2:]),
    }
    for name, value in (of_preset | given).items():
        value = tuple(value) if isinstance(value, list) else value
        if value != there[name]:
            flag = f"--{name} {value}"
            if name not in given:
                flag = f"--preset {wanted['preset']} has {name} {value}"
            raise ValueError(f"{flag}: the model that training starts from has {there[name]}")


def check_front(config: ModelConfig, freeze_blocks: int) -> None:
    """A ValueError where a front of so many blocks cannot be frozen: it is heard once, at its rate.

    What it makes is kept, two frames of features to one, so that it ends before frames are merged,
    and before a layer that learns meanwhile feeds its output back.
    """
    if not freeze_blocks:
        return
    if config.subsampling_factor != FRONT_RATE:
        raise ValueError(f"--freeze_blocks needs a model whose subsampling_factor is {FRONT_RATE}")
    limits = {f"has {config.n_layers} blocks": config.n_layers}
    if config.reduction_position:
        limits[f"merges frames after block {config.reduction_position}"] = config.reduction_position
    if config.self_conditioned:
        first = config.intermediate_layers[0]
        limits[f"feeds its output back after block {first}"] = first - 1
    reason, most = min(limits.items(), key=lambda limit: limit[1])
    if freeze_blocks > most:
        raise ValueError(f"--freeze_blocks {freeze_blocks}: the model {reason}: at most {most}")


def trained_on(checkpoint: Checkpoint, flag: str) -> str | list[str]:
    """Where the data is that a checkpoint was trained on; a ValueError, asking for `flag` instead.

    That is raised where the checkpoint does not say, or where the data is gone.
    """
    where = checkpoint.data.get("train", "")
    if not where:
        raise ValueError(f"this checkpoint names no training data: give {flag}")
    gone = [place for place in places(where) if not Path(place).exists()]
    if gone:
        raise ValueError(
            f"{gone[0]}: the data that the checkpoint was trained on is gone: give {flag}"
        )
    return where


def usable(
    utterances: Sequence[Utterance], checkpoint: Checkpoint, config: TrainConfig, say: Say
) -> list[Utterance]:
    """Utterances that can be trained on; says how many cannot, and why.

    A model that writes capitals or punctuation learns from texts with them.
    """
    if checkpoint.tokenizer.formatted:
        utterances = [replace(u, text=u.written or u.text) for u in utterances]
    absent = [u.audio_filepath for u in utterances if not Path(u.audio_filepath).exists()]
    if absent:
        raise ValueError(f"{absent[0]}: no such recording ({len(absent)} of the data are missing)")
    hidden = [u for u in utterances if is_hidden(u)]
    if hidden and not (config.freeze_blocks and config.freeze_epochs >= config.epochs):
        raise ValueError(
            f"{hidden[0].audio_filepath}: frames of a front, for training behind one that is "
            f"frozen throughout: give --freeze_blocks, and --freeze_epochs {config.epochs}"
        )
    short = [u for u in utterances if u.duration <= config.max_duration]
    if len(short) < len(utterances):
        say(f"left out: {len(utterances) - len(short)} longer than {config.max_duration:g} s")
    factor = checkpoint.model.config.total_factor
    possible, impossible = drop_impossible(
        short, checkpoint.tokenizer, checkpoint.features, factor, 1 + config.speed
    )
    if impossible:
        say(
            f"left out: {len(impossible)} with no text or more tokens than frames "
            f"(for example {impossible[0].id})"
        )
    if not possible:
        raise ValueError("no usable utterance is left to train on or to choose checkpoints by")
    return possible
