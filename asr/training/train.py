"""Trains a Conformer-CTC speech recogniser on recordings and their texts.

From nothing, from a checkpoint (--init_from), or onward from where a run stopped (--resume):

    python train.py --data_dir data/LibriSpeech --output_dir runs/baseline

OUTPUT_DIR/model.pt is the model of the best dev word error rate, for compress.py and transcribe.py.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from asr.corpus.manifest import Utterance, load_splits
from asr.network.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from asr.network.device import choose_device
from asr.network.model import ConformerCTC, count_parameters
from asr.runtime.cli import (
    Parser,
    add_flags,
    from_flags,
    guarded,
    int_list,
    read_config_file,
    yes_no,
)
from asr.runtime.config import PRESETS, FeatureConfig, ModelConfig, preset
from asr.runtime.tokenizer import ENGLISH, Tokenizer
from asr.training.data import drop_impossible
from asr.training.train_config import TrainConfig
from asr.training.trainer import Trainer

DIMENSIONS: dict[str, tuple[Any, str]] = {
    "d_model": (int, "width: numbers in the vector of a frame"),
    "n_layers": (int, "depth: Conformer blocks"),
    "n_heads": (int, "heads of the attention; must divide d_model"),
    "ff_expansion": (int, "how many times wider the feed-forward modules are inside"),
    "conv_kernel_size": (int, "frames that a convolution module sees; odd"),
    "subsampling": (str, "convolutions before the blocks: striding, or the lighter dw_striding"),
    "subsampling_factor": (int, "input frames (10 ms) to one of the blocks: 2, 4 or 8"),
    "subsampling_channels": (int, "channels of those convolutions"),
    "dropout": (float, "share of activations zeroed in training"),
    "intermediate_layers": (
        int_list, "blocks with a CTC loss of their own, such as 4,8; '' for none"
    ),
    "self_conditioned": (yes_no, "true: blocks after those also see what they read so far"),
}  # fmt: skip
PRESET_SIZES = "tiny 2 M parameters, base 6 M, small 13 M, medium 30 M, large 72 M"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data_dir", help="manifests or a LibriSpeech tree (see prepare_data.py)")
    parser.add_argument("--output_dir", help="folder for model.pt, last.pt and log.jsonl")
    parser.add_argument("--config", help="JSON or TOML file of flags; the command line wins")
    parser.add_argument(
        "--resume", action="store_true", default=None, help="go on from OUTPUT_DIR/last.pt"
    )
    parser.add_argument("--init_from", help="fine-tune this checkpoint: its model and tokens")
    model = parser.add_argument_group("model", "A preset has a value for each of the others.")
    model.add_argument("--preset", choices=PRESETS, help=f"size: {PRESET_SIZES} (default: small)")
    for name, (kind, meaning) in DIMENSIONS.items():
        model.add_argument(f"--{name}", type=kind, help=meaning)
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument("--tokenizer", choices=("char", "bpe"), help="units (default: char)")
    tokens.add_argument("--vocab_size", type=int, help="pieces of the BPE (default: 128)")
    tokens.add_argument(
        "--alphabet", help="characters beside the space; 'auto' takes those of the training texts "
        f"(default: {ENGLISH})",
    )  # fmt: skip
    add_flags(parser.add_argument_group("training"), TrainConfig)
    args = parser.parse_args(argv)
    args.file = {}
    if args.config:
        args.file = read_config_file(args.config)
        unknown = sorted(set(args.file) - set(vars(args)))
        if unknown:
            parser.error(f"{args.config}: unknown settings: {', '.join(unknown)}")
        for name, value in args.file.items():
            if getattr(args, name) is None:  # 0 on the command line is a choice
                setattr(args, name, value)
    for name in ("data_dir", "output_dir"):
        if not getattr(args, name):
            parser.error(f"--{name} is needed")
    return args


def run(args: argparse.Namespace) -> int:
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    config: TrainConfig = from_flags(TrainConfig, args)
    device = choose_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        return train(args, config)
    finally:
        if distributed:
            dist.destroy_process_group()


def train(args: argparse.Namespace, config: TrainConfig) -> int:
    first = not dist.is_initialized() or dist.get_rank() == 0
    say = print if first else lambda *_: None
    output_dir = Path(args.output_dir)
    last, model = output_dir / "last.pt", output_dir / "model.pt"
    if last.exists() and not args.resume:
        raise ValueError(
            f"{last} holds a run already; go on with --resume, or choose another --output_dir"
        )
    if not last.exists():
        if model.exists():
            raise ValueError(f"{model} is there already; choose another --output_dir")
        if args.resume:
            say(f"{last} does not exist yet: starting from the beginning")
    splits = load_splits(args.data_dir, seed=config.seed)
    for note in splits.notes:
        say(note)
    resuming = args.resume and last.exists()
    if resuming:
        checkpoint = load_checkpoint(last)
        if checkpoint.training is None:
            raise CheckpointError(f"{last}: holds no resume state")
        check_same_run(checkpoint.training["config"], config, str(last))
    elif args.init_from:
        checkpoint = start_from(args.init_from)
        checkpoint.data = {"train": args.data_dir}
    else:
        checkpoint = new_checkpoint(args, splits.train, config.seed)
    if resuming or args.init_from:
        check_same_model(args, checkpoint)
    train_set = usable(splits.train, checkpoint, config, say)
    dev_set = usable(splits.dev, checkpoint, config, lambda *_: None)
    trainer = Trainer(checkpoint, config, train_set, dev_set, output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if first and not resuming:
        (output_dir / "log.jsonl").write_text("", encoding="utf-8")  # fails early if not writable
    if resuming:
        assert checkpoint.training is not None
        trainer.resume(checkpoint.training)
        say(f"resuming after step {trainer.learner.step}, epoch {trainer.epoch + 1}")
    hours = [sum(u.duration for u in part) / 3600 for part in (train_set, dev_set)]
    say(
        f"{count_parameters(checkpoint.model) / 1e6:.1f} M parameters, {trainer.learner.device}, "
        f"{trainer.learner.precision}; train {len(train_set)} utterances, {hours[0]:.2f} h; "
        f"dev {len(dev_set)}, {hours[1]:.2f} h"
    )
    if not trainer.fit():
        say(f"stopped; go on with --resume ({last})")
        return 130
    say(f"best dev WER {trainer.best_wer:.2%} (epoch {trainer.best_epoch}): {output_dir}/model.pt")
    return 0


def start_from(path: str) -> Checkpoint:
    """The model of a checkpoint to fine-tune; its history names the file by its digest.

    Of a last.pt, the history has the unfinished run as well.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.training:
        run = {key: checkpoint.training[key] for key in ("config", "epoch")}
        checkpoint.history.append({"step": "train", **run})
        checkpoint.training = None
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    checkpoint.history.append({"step": "init", "sha256": digest})
    return checkpoint


def new_checkpoint(args: argparse.Namespace, train_set: list[Utterance], seed: int) -> Checkpoint:
    """A fresh model and tokenizer from the flags."""
    if args.tokenizer not in (None, "char", "bpe"):
        raise ValueError(f"--tokenizer {args.tokenizer!r} is not one of char, bpe")
    if args.tokenizer == "bpe" and args.alphabet:
        raise ValueError("--alphabet is for --tokenizer char; bpe takes its from the texts")
    if args.tokenizer != "bpe" and args.vocab_size:
        raise ValueError(f"--vocab_size {args.vocab_size} is for --tokenizer bpe")
    if args.tokenizer == "bpe":
        tokenizer = Tokenizer.bpe((u.text for u in train_set), args.vocab_size or 128)
    elif args.alphabet == "auto":
        tokenizer = Tokenizer.characters_of(u.text for u in train_set)
    else:
        tokenizer = Tokenizer.characters(args.alphabet or ENGLISH)
    model_config: ModelConfig = preset(
        args.preset or "small", vocab_size=len(tokenizer), **dimensions(args)
    )
    torch.manual_seed(seed)
    return Checkpoint(
        ConformerCTC(model_config), tokenizer, FeatureConfig(), {"train": args.data_dir}
    )


def dimensions(args: argparse.Namespace) -> dict[str, Any]:
    """The dimensions that were given; with n_layers alone, the intermediate CTC is half-way."""
    given = {name: v for name in DIMENSIONS if (v := getattr(args, name)) is not None}
    if args.n_layers and args.intermediate_layers is None:
        given["intermediate_layers"] = (args.n_layers // 2,) if args.n_layers > 1 else ()
    return given


def check_same_model(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """With --init_from or --resume the model is there: a flag that wants another is a mistake."""
    config, tokenizer = checkpoint.model.config, checkpoint.tokenizer
    wanted = PRESETS.get(args.preset, {}) | dimensions(args)
    wanted |= {"tokenizer": args.tokenizer, "vocab_size": args.vocab_size}
    if args.alphabet not in (None, "auto"):
        wanted["alphabet"] = "".join(Tokenizer.characters(args.alphabet).tokens[2:])
    there = vars(config) | {
        "tokenizer": "bpe" if tokenizer.sentencepiece_model else "char",
        "alphabet": "".join(tokenizer.tokens[2:]),
    }
    for name, value in wanted.items():
        value = tuple(value) if isinstance(value, list) else value
        if value is not None and value != there[name]:
            raise ValueError(
                f"--{name} {value}: the model that training starts from has {there[name]}"
            )


def usable(
    utterances: list[Utterance], checkpoint: Checkpoint, config: TrainConfig, say: Any
) -> list[Utterance]:
    """Utterances that can be trained on; says how many cannot, and why."""
    absent = [u.audio_filepath for u in utterances if not Path(u.audio_filepath).exists()]
    if absent:
        raise ValueError(f"{absent[0]}: no such recording ({len(absent)} of the data are missing)")
    short = [u for u in utterances if u.duration <= config.max_duration]
    if len(short) < len(utterances):
        say(f"left out: {len(utterances) - len(short)} longer than {config.max_duration:g} s")
    factor = checkpoint.model.config.subsampling_factor
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


def check_same_run(saved: dict[str, Any], config: TrainConfig, where: str) -> None:
    """Resuming with other settings would not be the same run.

    Another device or number of threads is: it only adds in another order.
    """
    free = {
        "num_workers", "log_every", "save_every", "tensorboard", "device", "patience", "threads",
    }  # fmt: skip
    now = vars(config)
    other = [f"--{k} {v}" for k, v in saved.items() if k not in free and v != now.get(k, v)]
    if other:
        raise ValueError(
            f"{where}: was trained with {' '.join(other)}; give the same to resume, or start anew "
            "from its model with --init_from"
        )


def main(argv: list[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
