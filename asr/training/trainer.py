"""Training: the loop over steps and epochs that learner, epochs, dev and run_folder are parts of.

The loop is exact: every step draws its dropout from (seed, step) and every utterance its
augmentation from (seed, epoch, utterance), so a run that was killed and resumed ends with the same
bits as one that was not.
"""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from asr.common.provenance import commit
from asr.corpus.manifest import Utterance
from asr.network.checkpoint import Checkpoint
from asr.network.device import memory_trouble
from asr.training.data import Batch, BatchDataset
from asr.training.dev import Heard, listen
from asr.training.epochs import Epochs
from asr.training.learner import Learner
from asr.training.run_folder import RunFolder
from asr.training.teacher import Taught, Teacher
from asr.training.train_config import BATCHES, TrainConfig


class Trainer:
    """Trains a checkpoint's model in place; the averaged best weights go to `output_dir`/model.pt.

    Where a process group runs, each process takes its share of every epoch.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: TrainConfig,
        train: Sequence[Utterance],
        dev: Sequence[Utterance],
        output_dir: str | Path,
    ) -> None:
        self.checkpoint, self.config = checkpoint, config
        self.learner = Learner(checkpoint.model, config)
        tokenizer, features = checkpoint.tokenizer, checkpoint.features
        self.train_set = BatchDataset(train, tokenizer, features, config.augment, config.seed)
        self.dev_set = BatchDataset(dev, tokenizer, features)
        if config.teacher:
            self.teach(config)
        rank, self.world = self.learner.rank, self.learner.world
        self.first = rank == 0  # the process that measures, writes and speaks
        self.epochs = Epochs(
            self.train_set, config, rank, self.world, self.learner.device.type == "cuda"
        )
        self.folder = RunFolder(Path(output_dir), checkpoint, config.tensorboard, self.first)
        self.front_cache = self.folder.path / "front"  # what a frozen front made, 0.npy, …
        self.epoch = self.batches_done = 0  # finished epochs; batches of the next one
        self.best = (math.inf, math.inf)  # dev WER and CER of the model that is kept
        self.best_epoch = -1
        self.busy_seconds = 0.0  # of the last epoch, waiting for data included
        self.stopping = self.stopped = False  # asked to stop; stopped
        self.commit = commit()

    def teach(self, config: TrainConfig) -> None:
        """Lets another network teach."""
        n_layers = self.checkpoint.model.config.n_layers
        block = config.teacher_block or max(1, n_layers // 2)
        if block > n_layers or config.freeze_epochs:
            raise ValueError(
                f"--teacher_block {block}: the model has {n_layers}"
                if block > n_layers
                else "--teacher and --freeze_epochs do not go together: a frozen front is not heard"
            )
        teacher = Teacher(config.teacher, config.teacher_output, self.checkpoint.features)
        self.train_set.teacher = teacher
        self.learner.objective = Taught(self.learner, teacher.width, block, config.teacher_weight)

    # ---- the run --------------------------------------------------------------------------

    def fit(self) -> bool:
        """Trains to the end; returns False where Ctrl-C (or SIGTERM) stopped it before."""
        old = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            steps = [entry["step"] for entry in self.checkpoint.history]
            if steps[-1:] == ["init"] and "train" in steps and self.learner.step == 0:
                heard = self.listen(self.learner.model)
                self.say(f"before training  {heard}")
            while self.epoch < self.config.epochs:
                started = time.perf_counter()
                self.train_epoch()
                if self.stopped:
                    self.save_state()
                    return False
                before = self.epoch, self.batches_done, self.best, self.best_epoch
                self.epoch, self.batches_done = self.epoch + 1, 0
                try:
                    self.finish_epoch(time.perf_counter() - started)
                except (ValueError, OSError):  # to be measured again when the run goes on
                    self.epoch, self.batches_done, self.best, self.best_epoch = before
                    raise
                patience = self.config.patience
                if patience and self.epoch - self.best_epoch >= patience and self.best_epoch > 0:
                    self.say(f"no better dev WER for {patience} epochs: stopped early")
                    break
            return True
        except (ValueError, OSError):  # a recording that cannot be read, say
            self.save_begun()
            raise
        except RuntimeError as error:
            way_out = memory_trouble(error)
            if not way_out:
                raise
            self.save_begun()
            raise ValueError(way_out) from None
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)

    def _stop(self, *_: Any) -> None:
        self.stopping = True

    def stop_now(self) -> bool:
        """Whether to stop after this step; several processes agree on it whenever they log."""
        if self.world == 1:
            self.stopped = self.stopping
        elif self.learner.step % self.config.log_every == 0:
            stopping = torch.tensor(float(self.stopping), device=self.learner.device)
            dist.all_reduce(stopping)
            self.stopped = bool(stopping)
        return self.stopped

    # ---- one epoch ------------------------------------------------------------------------

    def train_epoch(self) -> None:
        """The rest of the current epoch, from `batches_done` on."""
        config, learner = self.config, self.learner
        keys, frozen = self.epochs.keys(self.epoch), self.epochs.frozen(self.epoch)
        learner.teach_head_alone(self.epoch < config.head_epochs)
        learner.freeze(frozen)
        if not frozen:
            self.forget_front()
        self.train_set.begin_behind(learner.hear if frozen else None, self.front_cache)
        begin = time.perf_counter()
        losses: list[Tensor] = []
        seconds, since = 0.0, begin
        with tqdm(
            total=len(keys), initial=self.batches_done, desc=f"epoch {self.epoch + 1}",
            disable=None if self.first else True, unit="batch", leave=False, mininterval=1.0,
        ) as bar:  # fmt: skip
            for group in self.epochs.steps(keys[self.batches_done :]):
                progress = (self.epoch + self.batches_done / len(keys)) / config.epochs
                loss, norm = self.train_step(group, progress)
                losses.append(loss)
                seconds += sum(b.seconds for b in group) * self.world
                self.batches_done += len(group)
                bar.update(len(group))
                if learner.step % config.log_every == 0:
                    mean = float(torch.stack(losses).mean())  # waits for the GPU, once in log_every
                    now = time.perf_counter()
                    entry = {
                        "step": learner.step, "epoch": self.epoch + 1, "loss": round(mean, 4),
                        "lr": learner.optimizer.param_groups[0]["lr"],
                        "grad_norm": round(float(norm), 3),
                        "audio_per_second": round(seconds / (now - since), 1),
                        "skipped": int(learner.skipped),
                    }  # fmt: skip
                    self.folder.write_log(entry)
                    bar.set_postfix(
                        loss=f"{mean:.3f}", lr=f"{entry['lr']:.1e}",
                        speed=f"{entry['audio_per_second']:.0f} s/s",
                    )  # fmt: skip
                    losses, seconds, since = [], 0.0, now
                if self.stop_now():
                    break
                if config.save_every and learner.step % config.save_every == 0:
                    self.save_state()
        self.busy_seconds = time.perf_counter() - begin

    def forget_front(self) -> None:
        """Removes what the front has made before: another one, or what it was, may be behind it."""
        if self.first:
            for path in self.front_cache.glob("[0-9]*.npy"):
                path.unlink(missing_ok=True)

    def train_step(self, batches: Sequence[Batch], progress: float) -> tuple[Tensor, Tensor]:
        """One optimiser step; what is to happen before or after each goes around this."""
        return self.learner.train_step(batches, progress)

    def finish_epoch(self, seconds: float) -> None:
        """Measures on dev data, keeps what is to be kept, and saves the resume state."""
        model = self.averaged()
        heard = self.listen(model)
        if self.first:
            self.judge(model, heard, seconds)
            self.save_state()
        if self.world > 1:
            best = torch.tensor([*self.best, float(self.best_epoch)], dtype=torch.float64)
            best = best.to(self.learner.device)
            dist.broadcast(best, 0)
            self.best, self.best_epoch = (float(best[0]), float(best[1])), int(best[2])

    # ---- dev data -------------------------------------------------------------------------

    def averaged(self) -> nn.Module:
        """The model as it would be kept now."""
        return self.learner.average.model if self.config.ema else self.learner.model

    def listen(self, model: nn.Module) -> Heard:
        """What a model hears of the dev data."""
        return listen(model, self.dev_set, self.checkpoint.tokenizer, self.config.num_workers)

    def judge(self, model: nn.Module, heard: Heard, seconds: float) -> None:
        """Reports an epoch that took `seconds`, and keeps the best model so far."""
        entry = {
            "step": self.learner.step, "epoch": self.epoch, **heard.entry(),
            "seconds": round(seconds, 1),
            "loader_wait": round(self.epochs.wait_seconds / max(self.busy_seconds, 1e-9), 4),
            "skipped": int(self.learner.skipped),
        }  # fmt: skip
        self.folder.write_log(entry)
        better = (heard.wer, heard.cer) < self.best
        self.say(
            f"epoch {self.epoch}/{self.config.epochs}  {heard}{'  (best)' if better else ''}  "
            f"{seconds:.0f} s, {entry['loader_wait']:.1%} of it waiting for data"
        )
        for said, text in list(zip(heard.references, heard.texts, strict=True))[:2]:
            self.say(f"    said  {said}\n    heard {text or '(nothing)'}")
        if heard.silent:
            self.say(PLATEAU_HINT)
        if better:
            self.best, self.best_epoch = (heard.wer, heard.cer), self.epoch
            run = {"step": "train", "config": asdict(self.config), "epoch": self.epoch,
                   "dev_wer": heard.wer, "commit": self.commit}  # fmt: skip
            self.folder.save_model(model, run)

    def say(self, text: str) -> None:
        if self.first:
            tqdm.write(text)

    # ---- resuming -------------------------------------------------------------------------

    def save_state(self) -> None:
        """last.pt, from which `resume` goes on."""
        self.folder.save_state(self.state())

    def save_begun(self) -> None:
        """The same if there is anything to go on from."""
        if self.learner.step:
            self.save_state()

    def state(self) -> dict[str, Any]:
        """What `resume` needs beside the model's own weights and the log."""
        return {
            "config": asdict(self.config), "processes": self.world, "data": self.data_digest(),
            "epoch": self.epoch, "batches_done": self.batches_done,
            "best": self.best, "best_epoch": self.best_epoch, **self.learner.state(),
        }  # fmt: skip

    def resume(self, training: dict[str, Any]) -> None:
        """Takes up the state of a last.pt whose model weights the learner already has.

        A ValueError where batches counted on would be others: other data, or other processes.
        """
        if training.get("processes", self.world) != self.world:
            raise ValueError(f"this run has {training['processes']} processes, not {self.world}: "
                             "go on with as many")  # fmt: skip
        if training.get("data", "") not in ("", self.data_digest()):
            raise ValueError("the training data is not that of this run: go on with the same, or "
                             "start anew from its model with --init_from")  # fmt: skip
        self.learner.load(training)
        self.epoch, self.batches_done = training["epoch"], training["batches_done"]
        now = asdict(self.config)
        if self.batches_done and any(now[key] != training["config"][key] for key in BATCHES):
            self.say(f"other batches than before: epoch {self.epoch + 1} begins again")
            self.batches_done = 0
        self.best, self.best_epoch = tuple(training["best"]), training["best_epoch"]
        self.folder.restore_log(training["log"])

    def data_digest(self) -> str:
        """Of what is said in the training data and how long it takes, not of where it lies."""
        said = "".join(f"{u.duration} {u.text}\n" for u in self.train_set.utterances)
        return hashlib.sha256(said.encode()).hexdigest()


PLATEAU_HINT = """\
    hint: the model still answers with silence. Every CTC model does so at first: it has learnt
    that blank is the safest symbol, not yet where letters lie. With little data it lasts some
    hundred steps. If the loss stops falling near 2.9 for several epochs, try a lower learning
    rate, a longer warm-up, more sorted epochs (--sorted_epochs 3) or shorter utterances, and
    check that audio and texts belong together."""
