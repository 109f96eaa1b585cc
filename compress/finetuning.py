"""Fine-tuning after (or during) a compression step, with or without distillation.

The training of `train.py` with the settings that the checkpoint was trained with: same loader,
augmentation, loss and averaged weights. The last weights count, not the best on dev data, since a
schedule may still be on its way there. Distillation adds the divergence of every frame from what
the uncompressed model says, and on request the distance of every block's output from that model's.

The seam that `compress.core.run` calls; this file imports nothing from `compress.core`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from asr.corpus.manifest import Utterance
from asr.corpus.splits import load_splits
from asr.network.checkpoint import Checkpoint, load_checkpoint
from asr.network.device import autocast
from asr.network.model import ConformerCTC, Output
from asr.network.processes import is_first
from asr.training.data import Batch
from asr.training.dev import Heard
from asr.training.learner import Learner
from asr.training.start import Say, trained_on, usable
from asr.training.train_config import TrainConfig
from asr.training.trainer import Trainer
from compress.imitation import BlockOutputs, distance, divergence

Update = Callable[[nn.Module, float], None]
SHARE = 0.25  # of the learning rate in training


@dataclass(frozen=True)
class Options:
    """Options of fine-tuning; each becomes a flag of compress.py and an option of a recipe step."""

    fine_tune_epochs: int = field(default=0, metadata={"help": "epochs of training afterwards"})
    fine_tune_data: str = field(
        default="",
        metadata={
            "help": "data to train on, with --recipe in each step that names none; by default what "
            "the model was trained on"
        },
    )
    fine_tune_learning_rate: float = field(
        default=0.0,
        metadata={
            "help": "peak learning rate; 0: a quarter of that in training (int8, int4: 1/16)"
        },
    )
    fine_tune_seed: int = field(
        default=0, metadata={"help": "added to the training's seed of order and augmentation"}
    )
    distill_weight: float = field(
        default=0.5, metadata={"help": "share of the loss that is the uncompressed model's example"}
    )
    hint_weight: float = field(
        default=0.0,
        metadata={"help": "weight of the blocks' distance from those of the uncompressed model"},
    )

    def __post_init__(self) -> None:
        if self.fine_tune_epochs < 0:
            raise ValueError(f"fine_tune_epochs {self.fine_tune_epochs} must not be negative")
        if self.fine_tune_learning_rate < 0:
            raise ValueError(
                f"fine_tune_learning_rate {self.fine_tune_learning_rate} must not be negative"
            )
        if self.fine_tune_seed < 0:
            raise ValueError(f"fine_tune_seed {self.fine_tune_seed} must not be negative")
        if not 0 <= self.distill_weight <= 1:
            raise ValueError(f"distill_weight {self.distill_weight} must lie in [0, 1]")
        if self.hint_weight < 0:
            raise ValueError(f"hint_weight {self.hint_weight} must not be negative")


def fine_tune(
    checkpoint: Checkpoint, teacher: nn.Module, options: Options, folder: Path | None,
    update: Update | None = None, run: FineTuning | None = None,
) -> nn.Module:  # fmt: skip
    """Trains `checkpoint.model` and returns the averaged weights in eval mode, on the CPU.

    The checkpoint's history ends with the step that asks for this. `teacher` is the model before
    the first step. `update(model, fraction)` is called before each optimiser step. In `folder` an
    interrupted run leaves what it needs to resume; it then raises KeyboardInterrupt. `run` says how
    where it is not plain fine-tuning.
    """
    run = run or FineTuning()
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return fine_tune(checkpoint, teacher, options, Path(temporary), update, run)
    check_trainable(checkpoint.model)
    config = run.settings(checkpoint, options)
    train, dev = data(checkpoint, options, print if is_first() else quiet)
    place = folder / f"fine_tuning_{len(checkpoint.history)}"
    state = resumable(place / "last.pt", checkpoint)
    place.mkdir(parents=True, exist_ok=True)
    start = replace(checkpoint, model=state.model) if state else checkpoint
    try:
        speech = run.speech(train, config)
        tuner = run.tuner(start, config, speech, dev, place, teacher, options, update)
        if state:
            tuner.resume(cast(dict[str, Any], state.training))
        finished = tuner.fit()
    except Exception:
        if not (place / "last.pt").exists():
            shutil.rmtree(place, ignore_errors=True)
        raise
    if not finished:
        tuner.say(f"stopped; the same command goes on from {place / 'last.pt'}")
        raise KeyboardInterrupt
    return tuner.result()


def forget(folder: Path) -> None:
    """Removes what `fine_tune` has left in a folder for resuming."""
    for place in folder.glob("fine_tuning_*"):
        shutil.rmtree(place)


def check_trainable(model: nn.Module) -> None:
    """Raises ValueError where gradients cannot pass."""
    reason = untrainable(model)
    if reason:
        raise ValueError(reason)


def untrainable(model: nn.Module) -> str:
    """Why gradients cannot pass; "" where they can."""
    stuck = [name for name, m in model.named_modules() if type(m).__name__ == "Int8Linear"]
    if not stuck:
        return ""
    return (
        f"cannot fine-tune a model with integer layers ({stuck[0]}): fine-tune in the step that "
        "makes them, or in one before"
    )


def train_config(checkpoint: Checkpoint, options: Options, share: float = SHARE) -> TrainConfig:
    """The settings of the checkpoint's own training, as far as they fit fine-tuning.

    Its learning rate times `share` where the options name none; its weights of corpora for its own
    data alone. All layers learn, and from no other network than the uncompressed model.
    """
    trained = trained_with(checkpoint)
    rate = options.fine_tune_learning_rate or trained.learning_rate * share
    return replace(
        trained, epochs=options.fine_tune_epochs, learning_rate=rate, scheduler="cosine",
        warmup_steps=50, sorted_epochs=0, specaugment_start=0.0, patience=0, save_every=100,
        device="auto", compile=False, threads=min(trained.threads, os.cpu_count() or 1),
        tensorboard=False, head_epochs=0, freeze_blocks=0, freeze_epochs=0, teacher="",
        corpus_weights="" if options.fine_tune_data else trained.corpus_weights,
        seed=trained.seed + options.fine_tune_seed,
    )  # fmt: skip


def trained_with(checkpoint: Checkpoint) -> TrainConfig:
    """The settings of the checkpoint's own training; the defaults if it names none."""
    known = {f.name for f in fields(TrainConfig)}
    runs = [entry["config"] for entry in checkpoint.history if entry.get("step") == "train"]
    return TrainConfig(**{k: v for k, v in (runs or [{}])[-1].items() if k in known})


def data_path(checkpoint: Checkpoint, options: Options) -> str | list[str]:
    """Where the data to train on is; a ValueError where nobody says or it is gone."""
    if options.fine_tune_data and not Path(options.fine_tune_data).exists():
        raise ValueError(f"{options.fine_tune_data}: no such data to fine-tune on")
    return options.fine_tune_data or trained_on(checkpoint, "--fine_tune_data")


def quiet(text: str) -> None:
    """Says nothing."""


def data(
    checkpoint: Checkpoint, options: Options, say: Say = quiet
) -> tuple[list[Utterance], list[Utterance]]:
    """What can be used of the speech to train on, and of what is held out; says what cannot."""
    config = train_config(checkpoint, options)
    splits = load_splits(data_path(checkpoint, options), seed=trained_with(checkpoint).seed)
    for note in splits.notes:
        say(note)
    train = usable(splits.train, checkpoint, config, say)
    return train, usable(splits.dev, checkpoint, config, quiet)


def resumable(path: Path, checkpoint: Checkpoint) -> Checkpoint | None:
    """The interrupted run at `path`, None without one; a ValueError if it was another run."""
    if not path.exists():
        return None
    state = load_checkpoint(path)
    if state.history != checkpoint.history or state.training is None:
        raise ValueError(
            f"{path}: holds an interrupted run with other options or of another model; repeat that "
            "one, delete the folder or choose another --output_dir"
        )
    return state


class FineTuning:
    """How a run is set up; a method that trains in its own way has one of its own.

    `share` of the learning rate in training is taken where the options name no rate.
    """

    def __init__(self, share: float = SHARE) -> None:
        self.share = share

    def settings(self, checkpoint: Checkpoint, options: Options) -> TrainConfig:
        return train_config(checkpoint, options, self.share)

    def speech(self, train: list[Utterance], settings: TrainConfig) -> list[Utterance]:
        """What to train on, given what can be used of the training data."""
        return train

    def tuner(
        self, checkpoint: Checkpoint, settings: TrainConfig, train: Sequence[Utterance],
        dev: Sequence[Utterance], place: Path, teacher: nn.Module, options: Options,
        update: Update | None,
    ) -> FineTuner:  # fmt: skip
        return FineTuner(checkpoint, settings, train, dev, place, teacher, options, update)


class Lesson(Protocol):
    """An objective that can be taken off the models again."""

    def __call__(
        self, output: Output, batch: Batch, features: Tensor, lengths: Tensor
    ) -> Tensor: ...

    def remove(self) -> None: ...


class Imitation:
    """The objective of fine-tuning: what training minimises, and how far from the teacher it is."""

    def __init__(self, learner: Learner, teacher: nn.Module, options: Options) -> None:
        self.learner, self.options, self.plain = learner, options, learner.objective
        self.teacher = teacher.to(learner.device).eval().requires_grad_(False)
        if options.hint_weight:
            mine, theirs = learner.model.config, cast(ConformerCTC, self.teacher).config
            if (mine.d_output, mine.n_layers) != (theirs.d_output, theirs.n_layers):
                raise ValueError(
                    "hint_weight compares blocks of one size: distil again with it, or leave it "
                    "out where a student recovers"
                )
            self.blocks, self.examples = BlockOutputs(learner.model), BlockOutputs(self.teacher)

    def __call__(self, output: Output, batch: Batch, features: Tensor, lengths: Tensor) -> Tensor:
        loss = self.plain(output, batch, features, lengths)
        share, hint_weight = self.options.distill_weight, self.options.hint_weight
        if share or hint_weight:
            with torch.no_grad(), autocast(self.learner.device, self.learner.precision):
                example = self.teacher(features, lengths).log_probs
            far = divergence(output.log_probs, example, output.lengths)
            loss = (1 - share) * loss + share * far
        if hint_weight:
            far = distance(self.blocks.last, self.examples.last, output.lengths)
            loss = loss + hint_weight * far
        return loss

    def remove(self) -> None:
        """Leaves both models as they were."""
        if self.options.hint_weight:
            self.blocks.remove()
            self.examples.remove()


class FineTuner(Trainer):
    """A Trainer whose zero weights stay zero, with a schedule to tell of progress."""

    def __init__(
        self, checkpoint: Checkpoint, config: TrainConfig, train: Sequence[Utterance],
        dev: Sequence[Utterance], output_dir: Path, teacher: nn.Module, options: Options,
        update: Update | None,
    ) -> None:  # fmt: skip
        super().__init__(checkpoint, config, train, dev, output_dir)
        self.update = update
        self.imitation = self.make_objective(teacher, options)
        self.learner.objective = self.imitation

    def make_objective(self, teacher: nn.Module, options: Options) -> Lesson:
        return Imitation(self.learner, teacher, options)

    def train_step(self, batches: Sequence[Batch], progress: float) -> tuple[Tensor, Tensor]:
        model = self.learner.model
        if self.update:
            self.update(model, progress)
        zeros = [weight == 0 for weight in matrices(model)]
        result = super().train_step(batches, progress)
        for weight, zero in zip(matrices(model), zeros, strict=True):
            weight.masked_fill_(zero, 0)
        return result

    def averaged(self) -> nn.Module:
        """The averaged weights as they would be stored."""
        if self.update:
            self.update(self.learner.model, self.epoch / self.config.epochs)
        return self.keep_zeros()

    def keep_zeros(self) -> nn.Module:
        """The averaged weights, zero where the weights are."""
        model, average = self.learner.model, self.learner.average.model
        for weight, mean in zip(matrices(model), matrices(average), strict=True):
            mean.masked_fill_(weight == 0, 0)
        return average

    def judge(self, model: nn.Module, heard: Heard, seconds: float) -> None:
        """Reports; the last weights count, not the best."""
        self.say(f"fine-tuning, epoch {self.epoch}/{self.config.epochs}  {heard}  {seconds:.0f} s")
        entry = {"step": self.learner.step, "epoch": self.epoch, "dev_wer": round(heard.wer, 5)}
        self.folder.write_log(entry)

    def result(self) -> nn.Module:
        """The averaged weights and statistics, at the end of the run."""
        self.imitation.remove()
        return self.keep_zeros().to("cpu").eval().requires_grad_()


def matrices(model: nn.Module) -> list[Tensor]:
    """The weights of Linears and convolutions, of which zeros are to stay."""
    named = model.named_parameters()
    return [p.detach() for name, p in named if p.dim() > 1 and name.endswith(".weight")]
