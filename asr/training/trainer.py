"""Training: the step, evaluation on dev data, and the loop around them.

The loop is exact: every step draws its dropout from (seed, step) and every utterance its
augmentation from (seed, epoch, utterance), so a run that was killed and resumed ends with the same
bits as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from asr.common.metrics import error_rates
from asr.common.provenance import commit
from asr.corpus.manifest import Utterance
from asr.network.checkpoint import Checkpoint, save_checkpoint
from asr.network.device import autocast, choose_device, choose_precision
from asr.network.model import ConformerCTC, Output
from asr.runtime.decoding import greedy_decode_batch
from asr.runtime.tokenizer import Tokenizer
from asr.training.data import Batch, BatchDataset, Key, epoch_batches, make_loader, plain_batches
from asr.training.loss import ctc_loss
from asr.training.optim import AveragedModel, learning_rate_at, make_optimizer
from asr.training.train_config import TrainConfig


@torch.no_grad()
def transcribe_batches(
    model: nn.Module,
    dataset: BatchDataset,
    keys: Sequence[Key],
    tokenizer: Tokenizer,
    num_workers: int = 0,
    device: torch.device | None = None,
) -> list[str]:
    """Greedy texts of the dataset's utterances, in the dataset's order, in float32."""
    device = device or next(model.parameters()).device
    model.eval()
    texts = [""] * len(dataset.utterances)
    for batch in make_loader(dataset, keys, num_workers):
        output = model(batch.features.to(device), batch.feature_lengths.to(device))
        ids = greedy_decode_batch(output.log_probs.cpu().numpy(), output.lengths.cpu().numpy())
        for i, one in zip(batch.indices, ids, strict=True):
            texts[i] = tokenizer.decode(one)
    return texts


class Trainer:
    """Trains a checkpoint's model in place; the averaged best weights go to `output_dir`/model.pt.

    `distributed`: a process group is running; each process takes its share of every epoch.
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
        self.train_set = BatchDataset(
            train, checkpoint.tokenizer, checkpoint.features, config.augment, config.seed
        )
        self.dev_set = BatchDataset(dev, checkpoint.tokenizer, checkpoint.features)
        self.output_dir = Path(output_dir)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.device = choose_device(config.device)
        self.precision = choose_precision(config.precision, self.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.model: ConformerCTC = checkpoint.model.to(self.device)
        self.average = AveragedModel(self.model, config.ema)
        self.optimizer = make_optimizer(
            self.model, config.optimizer, config.learning_rate, config.weight_decay
        )
        self.step = self.epoch = self.batches_done = 0
        self.best_wer, self.best_epoch = math.inf, -1
        self.skipped = torch.zeros((), device=self.device)
        self.stopping = self.stopped = False  # asked to stop; stopped
        self.log: list[dict[str, Any]] = []
        self.commit = commit()
        self.wait_seconds = self.busy_seconds = 0.0  # of the last epoch: loader, and all
        self.forward: Any = self.model
        if config.compile:
            for block in self.model.blocks:  # not the convolutions: a graph for every length
                for part in ("ff1", "attn", "ff2"):
                    block.get_submodule(part).compile(dynamic=True)
        if self.world > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.forward)

    # ---- one step -------------------------------------------------------------------------

    def train_step(self, batches: Sequence[Batch], progress: float) -> tuple[Tensor, Tensor]:
        """One optimiser step over `batches`; returns the loss a token and the gradient norm.

        Nothing here waits for a GPU: a step whose gradient is not finite is skipped by the fused
        optimiser itself (found_inf) and counted on the device.
        """
        config = self.config
        self.model.train()
        torch.manual_seed((config.seed * 1_000_003 + self.step) * 64 + self.rank)
        rate = learning_rate_at(
            self.step, progress, config.learning_rate, config.scheduler, config.warmup_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tokens = torch.tensor(float(sum(int(b.target_lengths.sum()) for b in batches)))
        tokens = tokens.to(self.device)
        if self.world > 1:
            dist.all_reduce(tokens)
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            features = batch.features.to(self.device, non_blocking=True)
            lengths = batch.feature_lengths.to(self.device, non_blocking=True)
            last = number == len(batches) - 1
            if self.world > 1:
                self.forward.require_backward_grad_sync = last
            with autocast(self.device, self.precision):
                output = self.forward(features, lengths)
            loss = self.loss(output, batch, features, lengths) / tokens
            torch.autograd.backward(loss * self.world)  # DDP averages over processes, the loss sums
            total += loss.detach()
        if self.world > 1:
            dist.all_reduce(total)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        bad = (~torch.isfinite(norm)).float()
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += bad
        self.average.update(self.model, self.step)
        self.step += 1
        return total, norm

    def loss(self, output: Output, batch: Batch, features: Tensor, lengths: Tensor) -> Tensor:
        """Sum over the batch's utterances; features and lengths are the batch's on the device."""
        factor = self.model.config.subsampling_factor
        return ctc_loss(output, batch, factor, self.config.intermediate_weight)

    # ---- one epoch ------------------------------------------------------------------------

    def epoch_keys(self, epoch: int) -> list[Key]:
        """This process's batches of an epoch; every process has the same number of them."""
        config = self.config
        batches = epoch_batches(
            [u.duration for u in self.train_set.utterances], epoch, config.batch_size,
            config.batch_seconds, config.seed, epoch < config.sorted_epochs, config.augment,
        )  # fmt: skip
        batches += list(islice(cycle(batches), -len(batches) % self.world))
        masks = epoch >= config.specaugment_start * config.epochs
        return [(epoch, masks, batch) for batch in batches[self.rank :: self.world]]

    def groups(self, loader: Iterator[Batch]) -> Iterator[list[Batch]]:
        """`accumulate` batches at a time, measuring how long the loader kept us waiting."""
        while True:
            start = time.perf_counter()
            group = [b for _, b in zip(range(self.config.accumulate), loader, strict=False)]
            self.wait_seconds += time.perf_counter() - start
            if not group:
                return
            yield group

    def train_epoch(self) -> None:
        """The rest of the current epoch, from `batches_done` on."""
        config = self.config
        keys = self.epoch_keys(self.epoch)
        loader = make_loader(
            self.train_set, keys[self.batches_done :], config.num_workers,
            self.device.type == "cuda",
        )  # fmt: skip
        self.wait_seconds, begin = 0.0, time.perf_counter()
        losses: list[Tensor] = []
        seconds, since = 0.0, begin
        with tqdm(
            total=len(keys), initial=self.batches_done, desc=f"epoch {self.epoch + 1}",
            disable=True if self.rank else None, unit="batch", leave=False, mininterval=1.0,
        ) as bar:  # fmt: skip
            for group in self.groups(iter(loader)):
                progress = (self.epoch + self.batches_done / len(keys)) / config.epochs
                loss, norm = self.train_step(group, progress)
                losses.append(loss)
                seconds += sum(b.seconds for b in group) * self.world
                self.batches_done += len(group)
                bar.update(len(group))
                if self.step % config.log_every == 0:
                    mean = float(torch.stack(losses).mean())  # waits for the GPU, once in log_every
                    now = time.perf_counter()
                    entry = {
                        "step": self.step, "epoch": self.epoch + 1, "loss": round(mean, 4),
                        "lr": self.optimizer.param_groups[0]["lr"],
                        "grad_norm": round(float(norm), 3),
                        "audio_per_second": round(seconds / (now - since), 1),
                        "skipped": int(self.skipped),
                    }  # fmt: skip
                    self.write_log(entry)
                    bar.set_postfix(
                        loss=f"{mean:.3f}", lr=f"{entry['lr']:.1e}",
                        speed=f"{entry['audio_per_second']:.0f} s/s",
                    )  # fmt: skip
                    losses, seconds, since = [], 0.0, now
                if self.stop_now():
                    break
                if config.save_every and self.step % config.save_every == 0:
                    self.save_state()
        self.busy_seconds = time.perf_counter() - begin

    # ---- the run --------------------------------------------------------------------------

    def fit(self) -> bool:
        """Trains to the end; returns False where Ctrl-C (or SIGTERM) stopped it before."""
        old = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.epoch < self.config.epochs:
                started = time.perf_counter()
                self.train_epoch()
                if self.stopped:
                    self.save_state()
                    return False
                before = self.epoch, self.batches_done, self.best_wer, self.best_epoch
                self.epoch, self.batches_done = self.epoch + 1, 0
                try:
                    self.finish_epoch(time.perf_counter() - started)
                except (ValueError, OSError):  # to be measured again when the run goes on
                    self.epoch, self.batches_done, self.best_wer, self.best_epoch = before
                    raise
                patience = self.config.patience
                if patience and self.epoch - self.best_epoch >= patience and self.best_epoch > 0:
                    self.say(f"no better dev WER for {patience} epochs: stopped early")
                    break
            return True
        except (ValueError, OSError):  # a recording that cannot be read, say
            if self.step:
                self.save_state()
            raise
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)

    def _stop(self, *_: Any) -> None:
        self.stopping = True

    def stop_now(self) -> bool:
        """Whether to stop after this step; several processes agree on it whenever they log."""
        if self.world == 1:
            self.stopped = self.stopping
        elif self.step % self.config.log_every == 0:
            stopping = torch.tensor(float(self.stopping), device=self.device)
            dist.all_reduce(stopping)
            self.stopped = bool(stopping)
        return self.stopped

    def finish_epoch(self, seconds: float) -> None:
        """Dev WER of the averaged weights, the best model, the resume state, the report."""
        if self.rank == 0:
            model = self.average.model if self.config.ema else self.model
            rates, references, texts = self.dev_rates(model)
            entry = {
                "step": self.step, "epoch": self.epoch, "dev_wer": round(rates["wer"], 5),
                "dev_cer": round(rates["cer"], 5), "seconds": round(seconds, 1),
                "loader_wait": round(self.wait_seconds / max(self.busy_seconds, 1e-9), 4),
                "skipped": int(self.skipped),
            }  # fmt: skip
            self.write_log(entry)
            better = rates["wer"] < self.best_wer
            self.say(
                f"epoch {self.epoch}/{self.config.epochs}  dev WER {rates['wer']:.2%}  "
                f"CER {rates['cer']:.2%}{'  (best)' if better else ''}  {seconds:.0f} s, "
                f"{entry['loader_wait']:.1%} of it waiting for data"
            )
            for i in range(min(2, len(texts))):
                self.say(f"    said  {references[i]}\n    heard {texts[i] or '(nothing)'}")
            if rates["deletions"] > 0.95 * rates["words"]:
                self.say(PLATEAU_HINT)
            if better:
                self.best_wer, self.best_epoch = rates["wer"], self.epoch
                self.save_model(model)
            self.save_state()
        if self.world > 1:
            best = torch.tensor([self.best_wer, float(self.best_epoch)], dtype=torch.float64)
            best = best.to(self.device)
            dist.broadcast(best, 0)
            self.best_wer, self.best_epoch = float(best[0]), int(best[1])

    def dev_rates(self, model: nn.Module) -> tuple[dict[str, Any], list[str], list[str]]:
        """Error rates on the dev data, with the texts said and heard."""
        utterances = self.dev_set.utterances
        keys = list(plain_batches(utterances, 32, 120.0))
        texts = transcribe_batches(
            model, self.dev_set, keys, self.checkpoint.tokenizer, self.config.num_workers
        )
        references = [u.text for u in utterances]
        return error_rates(references, texts), references, texts

    # ---- files ----------------------------------------------------------------------------

    def save_model(self, model: nn.Module) -> None:
        """model.pt: the float32 weights as chosen, no optimiser."""
        run = {"step": "train", "config": asdict(self.config), "epoch": self.epoch,
               "dev_wer": self.best_wer, "commit": self.commit}  # fmt: skip
        history = [*self.checkpoint.history, run]
        save_checkpoint(
            self.output_dir / "model.pt",
            Checkpoint(
                model,  # type: ignore[arg-type]
                self.checkpoint.tokenizer, self.checkpoint.features, self.checkpoint.data, history,
            ),
        )  # fmt: skip

    def save_state(self) -> None:
        """last.pt: everything that resuming needs."""
        if self.rank > 0:
            return
        c = self.checkpoint
        training = {
            "config": asdict(self.config), "processes": self.world, "data": self.data_digest(),
            "step": self.step, "epoch": self.epoch, "batches_done": self.batches_done,
            "best_wer": self.best_wer, "best_epoch": self.best_epoch, "skipped": int(self.skipped),
            "log": self.log, "average": self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        state = Checkpoint(self.model, c.tokenizer, c.features, c.data, c.history, training)
        save_checkpoint(self.output_dir / "last.pt", state)

    def resume(self, training: dict[str, Any]) -> None:
        """Takes up the state of a last.pt whose model weights are already in `self.model`.

        A ValueError where batches counted on would be others: other data, or other processes.
        """
        if training.get("processes", self.world) != self.world:
            raise ValueError(f"this run has {training['processes']} processes, not {self.world}: "
                             "go on with as many")  # fmt: skip
        if training.get("data", "") not in ("", self.data_digest()):
            raise ValueError("the training data is not that of this run: go on with the same, or "
                             "start anew from its model with --init_from")  # fmt: skip
        self.average.model.load_state_dict(training["average"])
        self.optimizer.load_state_dict(training["optimizer"])
        self.step, self.epoch = training["step"], training["epoch"]
        self.batches_done = training["batches_done"]
        self.best_wer, self.best_epoch = training["best_wer"], training["best_epoch"]
        self.skipped.fill_(training["skipped"])
        self.log = training["log"]
        if self.rank == 0:  # drop lines of steps that will be taken again
            lines = "".join(json.dumps(entry) + "\n" for entry in self.log)
            (self.output_dir / "log.jsonl").write_text(lines, encoding="utf-8")

    def data_digest(self) -> str:
        """Of what is said in the training data and how long it takes, not of where it lies."""
        said = "".join(f"{u.duration} {u.text}\n" for u in self.train_set.utterances)
        return hashlib.sha256(said.encode()).hexdigest()

    def write_log(self, entry: dict[str, Any]) -> None:
        """One line of log.jsonl, and the same numbers to TensorBoard."""
        if self.rank > 0:
            return
        self.log.append(entry)
        with open(self.output_dir / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self.config.tensorboard:
            if not hasattr(self, "writer"):
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(self.output_dir / "tensorboard"))
            for name, value in entry.items():
                if name not in ("step", "epoch"):
                    self.writer.add_scalar(name, value, self.step)
            self.writer.flush()

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)


PLATEAU_HINT = """\
    hint: the model still answers with silence. Every CTC model does so at first: it has learnt
    that blank is the safest symbol, not yet where letters lie. With little data it lasts some
    hundred steps. If the loss stops falling near 2.9 for several epochs, try a lower learning
    rate, a longer warm-up, more sorted epochs (--sorted_epochs 3) or shorter utterances, and
    check that audio and texts belong together."""
