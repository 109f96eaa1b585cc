"""A whole training run: data, model, and the trainer until it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from asr.corpus.splits import load_splits, places
from asr.network.model import count_parameters
from asr.network.processes import is_first, process_group
from asr.training.start import (
    WANTED,
    check_front,
    check_same_model,
    make_tokenizer,
    new_checkpoint,
    renew_tokens,
    resume_from,
    start_from,
    usable,
)
from asr.training.train_config import TrainConfig
from asr.training.trainer import Trainer

PAIRS = {  # flags that say nothing without another
    "freeze_epochs": "freeze_blocks", "teacher_output": "teacher", "teacher_block": "teacher",
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What a run has made: the model of its best dev word error rate, a share."""

    model_path: Path
    dev_wer: float
    epoch: int
    finished: bool  # False where Ctrl-C stopped it; `resume` goes on


def train(
    data_dir: str | Path | Sequence[str | Path], output_dir: str | Path, *,
    init_from: str | Path | None = None, new_tokens: bool = False, resume: bool = False,
    **settings: Any,
) -> Trained:  # fmt: skip
    """Trains a model on manifests or LibriSpeech folders, into `output_dir`; says how it goes.

    `settings` are the other flags of train.py: fields of `TrainConfig`, `preset` and the dimensions
    that it stands for, `tokenizer`, `vocab_size`, `alphabet`. `init_from` names the checkpoint to
    fine-tune, `new_tokens` gives it those of the training texts; `resume` goes on from
    `output_dir`/last.pt where there is one. Raises ValueError for data, settings and checkpoints
    that cannot be used, before anything is written.
    """
    known = {f.name for f in fields(TrainConfig)}
    unknown = sorted(settings.keys() - known - set(WANTED))
    if unknown:
        raise ValueError(f"no such setting of training: {', '.join(unknown)}")
    config = TrainConfig(**{name: settings[name] for name in settings.keys() & known})
    for flag, needed in PAIRS.items():
        if getattr(config, flag) and not getattr(config, needed):
            raise ValueError(f"--{flag} {getattr(config, flag)} goes with --{needed}")
    wanted = {name: settings[name] for name in WANTED if settings.get(name) is not None}
    data = places(data_dir)
    with process_group(config.device):
        return _train(data, Path(output_dir), init_from, new_tokens, resume, config, wanted)


def _train(
    data: list[str], output_dir: Path, init_from: str | Path | None, new_tokens: bool,
    resume: bool, config: TrainConfig, wanted: dict[str, Any],
) -> Trained:  # fmt: skip
    first = is_first()
    say = print if first else lambda *_: None
    last, model = output_dir / "last.pt", output_dir / "model.pt"
    if last.exists() and not resume:
        raise ValueError(
            f"{last} holds a run already; go on with --resume, or choose another --output_dir"
        )
    if not last.exists():
        if model.exists():
            raise ValueError(f"{model} is there already; choose another --output_dir")
        if resume:
            say(f"{last} does not exist yet: starting from the beginning")
    if new_tokens and not init_from:
        raise ValueError("--new_tokens goes with --init_from, a model whose encoder is kept")
    splits = load_splits(data, seed=config.seed)
    for note in splits.notes:
        say(note)
    resuming = resume and last.exists()
    named = data if len(data) > 1 else data[0]
    if resuming:
        checkpoint = resume_from(last, config)
    elif init_from:
        checkpoint = start_from(init_from, say)
        if new_tokens:
            renew_tokens(checkpoint, make_tokenizer(wanted, splits.train), config.seed)
        checkpoint.data = {"train": named}
    else:
        checkpoint = new_checkpoint(wanted, splits.train, named, config.seed)
    check_front(checkpoint.model.config, config.freeze_blocks)
    if resuming or init_from:
        check_same_model(wanted, checkpoint)
    train_set = usable(splits.train, checkpoint, config, say)
    dev_set = usable(splits.dev, checkpoint, config, lambda *_: None)
    trainer = Trainer(checkpoint, config, train_set, dev_set, output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if first and not resuming:
        (output_dir / "log.jsonl").write_text("", encoding="utf-8")  # fails early if not writable
        trainer.forget_front()
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
    finished = trainer.fit()
    if finished:
        say(f"best dev WER {trainer.best[0]:.2%} (epoch {trainer.best_epoch}): {model}")
    else:
        say(f"stopped; go on with --resume ({last})")
    return Trained(model, trainer.best[0], trainer.best_epoch, finished)
