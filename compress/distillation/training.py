"""The run of a distillation: fine-tuning with another objective, and speech without transcripts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from asr.common.metrics import error_rates
from asr.corpus.manifest import Utterance, read_manifest
from asr.measure.agreement import frame_agreement
from asr.network.checkpoint import Checkpoint
from asr.network.model import ConformerCTC, Output
from asr.runtime.audio import EXTENSIONS, audio_duration
from asr.runtime.decoding import greedy_decode
from asr.runtime.features import subsampled_length
from asr.training.data import Batch, BatchDataset, plain_batches
from asr.training.dev import Heard
from asr.training.learner import Learner
from asr.training.optim import make_optimizer
from asr.training.train_config import TrainConfig
from compress.distillation.cache import Cache, CacheError, write_cache
from compress.distillation.teacher import Teacher, answers
from compress.finetuning import FineTuner, FineTuning, Options, Update, train_config
from compress.imitation import BlockOutputs, Projections, counterpart, distance, divergence

if TYPE_CHECKING:
    from compress.distillation.method import Config


def unlabelled(path: str, longest: float) -> list[Utterance]:
    """Recordings up to `longest` seconds, without texts; ValueError if there are none.

    `path`: a folder with recordings at any depth, or a manifest, of which no text is used.
    """
    place = Path(path)
    if place.is_file():
        found = [replace(u, text="", written="") for u in read_manifest(place)]
    elif place.is_dir():
        paths = sorted(p for p in place.rglob("*") if p.suffix.lower() in EXTENSIONS)
        if not paths:
            raise ValueError(f"{path}: holds no recordings ({', '.join(EXTENSIONS)})")
        found = [Utterance(str(p), audio_duration(p), "") for p in paths]
    else:
        raise ValueError(f"{path}: not a folder or manifest; --unlabelled names one of recordings")
    kept = [u for u in found if 0.1 <= u.duration <= longest]
    if not kept:
        raise ValueError(f"{path}: no recording of 0.1 to {longest:g} s to learn from")
    return kept


class Run(FineTuning):
    """How `finetuning.fine_tune` distils."""

    def __init__(self, config: Config, teachers: Sequence[Teacher]) -> None:
        self.config, self.teachers = config, teachers

    def settings(self, checkpoint: Checkpoint, options: Options) -> TrainConfig:
        """Those of fine-tuning, but with the whole learning rate of the teacher's training."""
        settings = train_config(checkpoint, options, share=1.0)
        if self.config.cache:  # frames must be those that the teacher heard
            settings = replace(settings, speed=0.0, silence=0.0)
        return replace(settings, seed=settings.seed + self.config.seed)

    def speech(self, train: list[Utterance], settings: TrainConfig) -> list[Utterance]:
        """What has transcripts, then what has none."""
        if not self.config.unlabelled:
            return train
        return train + unlabelled(self.config.unlabelled, settings.max_duration)

    def tuner(
        self, checkpoint: Checkpoint, settings: TrainConfig, train: Sequence[Utterance],
        dev: Sequence[Utterance], place: Path, teacher: nn.Module, options: Options,
        update: Update | None,
    ) -> FineTuner:  # fmt: skip
        return Distiller(self, checkpoint, settings, train, dev, place, options)


class Distillation:
    """The objective: transcripts where there are some, the teachers' answers, their blocks."""

    def __init__(
        self, learner: Learner, config: Config, teachers: Sequence[Teacher], cache: Cache | None,
        hint_weight: float,
    ) -> None:  # fmt: skip
        self.learner, self.config, self.teachers = learner, config, teachers
        self.cache, self.hint_weight, self.plain = cache, hint_weight, learner.objective
        for teacher in teachers:
            if isinstance(teacher.source, nn.Module):
                teacher.source.to(learner.device).eval().requires_grad_(False)
        self.projections: Projections | None = None
        if hint_weight:
            source = cast(ConformerCTC, teachers[0].source)
            self.blocks, self.examples = BlockOutputs(learner.model), BlockOutputs(source)
            sizes = learner.model.config.d_output, source.config.d_output
            torch.manual_seed(config.seed)
            self.projections = Projections(self.blocks.depths, *sizes).to(learner.device)

    def __call__(self, output: Output, batch: Batch, features: Tensor, lengths: Tensor) -> Tensor:
        alpha = self.config.alpha
        loss = torch.zeros((), device=features.device)
        if bool((batch.target_lengths > 0).any()):
            loss = alpha * self.plain(*with_texts(output, batch), features, lengths)
        if alpha < 1:
            example = self.example(output, batch, features, lengths)
            far = divergence(
                output.log_probs, example, output.lengths, self.config.temperature,
                self.config.blanks,
            )  # fmt: skip
            loss = loss + (1 - alpha) * far
        if self.projections is not None:
            if self.cache or alpha == 1:  # nobody has asked the teacher about this batch
                self.ask(output, features, lengths)
            mine = self.projections(self.blocks.last)
            n, theirs = len(mine), self.examples.last
            chosen = [theirs[counterpart(i, n, len(theirs))] for i in range(n)]
            loss = loss + self.hint_weight * distance(mine, chosen, output.lengths)
        return loss

    def example(self, output: Output, batch: Batch, features: Tensor, lengths: Tensor) -> Tensor:
        """What the teachers say (B, T', V)."""
        if self.cache is not None:
            found = self.cache.answers(batch.indices, output.log_probs.shape[1])
            return found.to(features.device, non_blocking=True)
        return self.ask(output, features, lengths)

    def ask(self, output: Output, features: Tensor, lengths: Tensor) -> Tensor:
        frames = output.log_probs.shape[1]
        return answers(self.teachers, features, lengths, frames, self.learner.precision)

    def remove(self) -> None:
        """Leaves the models as they were."""
        if self.projections is not None:
            self.blocks.remove()
            self.examples.remove()


def with_texts(output: Output, batch: Batch) -> tuple[Output, Batch]:
    """The part of a batch that has transcripts."""
    rows = batch.target_lengths > 0
    if bool(rows.all()):
        return output, batch
    kept = rows.nonzero().flatten()
    there = kept.to(output.log_probs.device)
    part = Output(
        output.log_probs[there], output.lengths[there], [x[there] for x in output.intermediate]
    )
    return part, replace(
        batch, features=batch.features[kept], feature_lengths=batch.feature_lengths[kept],
        targets=batch.targets[kept], target_lengths=batch.target_lengths[kept],
        indices=tuple(batch.indices[i] for i in kept.tolist()),
    )  # fmt: skip


class Distiller(FineTuner):
    """Fine-tunes the student; says how far it agrees with its teacher."""

    def __init__(
        self, run: Run, checkpoint: Checkpoint, settings: TrainConfig,
        train: Sequence[Utterance], dev: Sequence[Utterance], place: Path, options: Options,
    ) -> None:  # fmt: skip
        self.how = run
        super().__init__(checkpoint, settings, train, dev, place, nn.Identity(), options, None)
        self.best_tokens: list[np.ndarray] = []  # of the teachers, by utterance of dev
        self.teacher_wer = 0.0
        texts = [u for u in train if u.text]
        spoken = sum(len(self.train_set.targets[i]) for i, u in enumerate(train) if u.text)
        self.token_rate = spoken / sum(u.duration for u in texts)  # tokens a second
        self.learner.weight = self.weight
        projections = self.objective.projections
        if projections is not None and list(projections.parameters()):
            self.projector = make_optimizer(
                projections, "adamw", settings.learning_rate, settings.weight_decay
            )

    def make_objective(self, teacher: nn.Module, options: Options) -> Distillation:
        self.objective = Distillation(
            self.learner, self.how.config, self.how.teachers, self.open_cache(), options.hint_weight
        )
        return self.objective

    def weight(self, batch: Batch) -> float:
        """Tokens in a batch; of speech without transcripts as many as its length suggests."""
        silent = batch.feature_lengths[batch.target_lengths == 0].sum()
        hop = self.checkpoint.features.hop_length / self.checkpoint.features.sample_rate
        return float(batch.target_lengths.sum() + silent * hop * self.token_rate)

    def train_step(self, batches: Sequence[Batch], progress: float) -> tuple[Tensor, Tensor]:
        result = super().train_step(batches, progress)
        if hasattr(self, "projector"):
            rates, optimizer = self.learner.optimizer, self.projector
            for group in optimizer.param_groups:
                group["lr"] = rates.param_groups[0]["lr"]
                for parameter in group["params"]:
                    if self.world > 1:
                        dist.all_reduce(parameter.grad)
                        parameter.grad /= self.world
            optimizer.found_inf = rates.found_inf  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return result

    def state(self) -> dict[str, Any]:
        found = super().state() | {"teachers": [t.digest for t in self.how.teachers]}
        if hasattr(self, "projector"):
            assert self.objective.projections is not None
            found["projections"] = self.objective.projections.state_dict()
            found["projector"] = self.projector.state_dict()
        return found

    def resume(self, training: dict[str, Any]) -> None:
        if training["teachers"] != [t.digest for t in self.how.teachers]:
            raise ValueError(
                "the interrupted run had another teacher: go on with the same, or choose another "
                "--output_dir"
            )
        super().resume(training)
        if hasattr(self, "projector"):
            assert self.objective.projections is not None
            self.objective.projections.load_state_dict(training["projections"])
            self.projector.load_state_dict(training["projector"])

    # ---- agreement on dev data ------------------------------------------------------------

    def judge(self, model: nn.Module, heard: Heard, seconds: float) -> None:
        """Reports error rates of student and teacher, and frames with the same best token."""
        if not self.best_tokens:
            said = list(self.teachers_on(self.dev_set))
            self.best_tokens = [x.argmax(1).numpy() for _, x in sorted(said, key=lambda p: p[0])]
            decode = self.checkpoint.tokenizer.decode
            texts = [decode(greedy_decode(x.numpy())) for _, x in sorted(said, key=lambda p: p[0])]
            self.teacher_wer = error_rates(heard.references, texts)["wer"]
        mine = [x.argmax(1).numpy() for _, x in sorted(self.student_on(model), key=lambda p: p[0])]
        agreement = frame_agreement(mine, self.best_tokens)
        wer, cer = heard.wer, heard.cer
        self.say(
            f"distillation, epoch {self.epoch}/{self.config.epochs}  dev WER {wer:.2%} (teacher "
            f"{self.teacher_wer:.2%})  CER {cer:.2%}  same frames {agreement['frames']:.1%}, "
            f"without blank {agreement['non_blank']:.1%}  {seconds:.0f} s"
        )
        self.folder.write_log({
            "step": self.learner.step, "epoch": self.epoch, "dev_wer": round(wer, 5),
            "teacher_dev_wer": round(self.teacher_wer, 5),
            "agreement": round(agreement["frames"], 5),
            "agreement_non_blank": round(agreement["non_blank"], 5),
        })  # fmt: skip

    def student_on(self, model: nn.Module) -> Iterator[tuple[int, Tensor]]:
        device = self.learner.device
        with torch.no_grad():
            for key in plain_batches(self.dev_set.utterances, 32, 120.0):
                batch = self.dev_set[key]
                lengths = batch.feature_lengths.to(device)
                output = model.eval()(batch.features.to(device), lengths)
                yield from by_utterance(batch, output.log_probs, output.lengths)

    def teachers_on(self, dataset: BatchDataset) -> Iterator[tuple[int, Tensor]]:
        """What they say of each utterance, with its position."""
        factor = self.learner.model.config.total_factor
        device = self.learner.device
        for key in plain_batches(dataset.utterances, 32, 120.0):
            batch = dataset[key]
            frames = int(subsampled_length(batch.features.shape[1], factor))
            features, lengths = batch.features.to(device), batch.feature_lengths.to(device)
            said = answers(self.how.teachers, features, lengths, frames, "float32")
            yield from by_utterance(batch, said, subsampled_length(batch.feature_lengths, factor))

    # ---- the cache ------------------------------------------------------------------------

    def open_cache(self) -> Cache | None:
        """The teachers' answers about the training data, asked for now if nobody has yet."""
        config = self.how.config
        if not config.cache or config.alpha == 1:
            return None
        folder = Path(config.cache)
        digests = [t.digest for t in self.how.teachers]
        teacher = hashlib.sha256(" ".join([*digests, str(config.cache_tokens)]).encode())
        vocab_size, utterances = len(self.checkpoint.tokenizer), self.train_set.utterances
        if self.first and not (folder / "index.json").exists():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise CacheError(f"{folder}: neither a cache nor an empty folder; name another")
            self.say(f"asking the teacher about {len(utterances)} recordings, for {folder}")
            for t in self.how.teachers:
                if isinstance(t.source, nn.Module):
                    t.source.to(self.learner.device).eval()
            plain = BatchDataset(utterances, self.checkpoint.tokenizer, self.checkpoint.features)
            write_cache(
                folder, teacher.hexdigest(), config.cache_tokens, vocab_size, utterances,
                lambda: self.teachers_on(plain),
            )  # fmt: skip
        if self.world > 1:
            dist.barrier()
        return Cache(folder, teacher.hexdigest(), vocab_size, utterances)


def by_utterance(batch: Batch, log_probs: Tensor, lengths: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Position and valid frames (T', V) of each, on the CPU."""
    for i, x, n in zip(batch.indices, log_probs.cpu(), lengths.tolist(), strict=True):
        yield i, x[:n]
