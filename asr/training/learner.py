"""One step: a model, what it is to minimise, its optimiser and its running average."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from asr.network.device import autocast, choose_device, choose_precision
from asr.network.model import ConformerCTC, Output
from asr.runtime.features import subsampled_length
from asr.training.data import Batch
from asr.training.loss import Objective, ctc_loss
from asr.training.optim import AveragedModel, learning_rate_at, make_optimizer
from asr.training.train_config import TrainConfig


class Learner:
    """Takes optimiser steps with a model, in place; `average` holds its averaged weights.

    Where a process group runs, this is process `rank` of `world`, each with a share of every step.
    `objective` may be replaced by one that adds to it, `weight` by another measure of how much a
    batch holds, which a step's loss is divided by; parameters that need no gradient when the
    learner is made are never changed.
    """

    def __init__(self, model: ConformerCTC, config: TrainConfig) -> None:
        self.config = config
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.device = choose_device(config.device)
        self.precision = choose_precision(config.precision, self.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.model: ConformerCTC = model.to(self.device)
        self.average = AveragedModel(self.model, config.ema)
        self.front = self.model.front_modules(config.freeze_blocks)
        self.optimizer = make_optimizer(
            self.model, config.optimizer, config.learning_rate, config.weight_decay,
            [p for module in self.front for p in module.parameters()], config.front_rate,
        )  # fmt: skip
        self.helpers = nn.ModuleList()  # trained with the model, and in no checkpoint of it
        self.frozen_blocks = 0  # of the front: batches begin behind them
        self.objective: Objective = self.ctc
        self.weight: Callable[[Batch], float] = spoken_tokens
        if config.head_epochs and self.world > 1:
            raise ValueError("--head_epochs needs a single process")
        self.behind = [  # what stands before the output layer
            p for name, p in self.model.named_parameters()
            if p.requires_grad and not name.startswith(("head.", "conditioning."))
        ]  # fmt: skip
        self.head_alone = False
        self.step = 0  # steps taken
        self.skipped = torch.zeros((), device=self.device)
        self.forward: Any = self.model
        if config.compile:
            for block in self.model.blocks:  # not the convolutions: a graph for every length
                for part in ("ff1", "attn", "ff2"):
                    block.get_submodule(part).compile(dynamic=True)
        if self.world > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.forward)

    def teach_head_alone(self, alone: bool) -> None:
        """Whether all but the output layer keeps its weights and batch statistics for now."""
        self.head_alone = alone
        for parameter in self.behind:
            parameter.requires_grad_(not alone)

    def train_step(self, batches: Sequence[Batch], progress: float) -> tuple[Tensor, Tensor]:
        """One optimiser step over `batches`; returns the loss a token and the gradient norm.

        `progress` is how much of the run is done, 0 to 1. Nothing here waits for a GPU: a step
        whose gradient is not finite is skipped by the fused optimiser itself (found_inf) and
        counted on the device.
        """
        config = self.config
        self.model.train(not self.head_alone)
        for module in self.front:
            module.eval()
        factor = self.model.config.subsampling_factor if self.frozen_blocks else 1
        torch.manual_seed((config.seed * 1_000_003 + self.step) * 64 + self.rank)
        rate = learning_rate_at(
            self.step, progress, config.learning_rate, config.scheduler, config.warmup_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        tokens = torch.tensor(float(sum(self.weight(batch) for batch in batches)))
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
                output = self.forward(
                    features, subsampled_length(lengths, factor), self.frozen_blocks
                )
            loss = self.objective(output, batch, features, lengths) / tokens
            torch.autograd.backward(loss * self.world)  # DDP averages over processes, the loss sums
            total += loss.detach()
        if self.world > 1:
            dist.all_reduce(total)
        parameters = [*self.model.parameters(), *self.helpers.parameters()]
        if self.world > 1:
            for p in self.helpers.parameters():
                dist.all_reduce(p.grad)
        norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        bad = (~torch.isfinite(norm)).float()
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += bad
        self.average.update(self.model, self.step)
        self.step += 1
        return total, norm

    def freeze(self, frozen: bool) -> None:
        """Whether the front keeps its weights, and batches hold what it makes of features."""
        self.frozen_blocks = self.config.freeze_blocks if frozen else 0
        for module in self.front:
            module.eval().requires_grad_(not frozen and not self.head_alone)

    @torch.no_grad()
    def hear(self, features: Tensor) -> Tensor:
        """What the front makes of an utterance (1, T, n_mels); called in the loader's processes."""
        lengths = torch.tensor([features.shape[1]])
        return self.model.front(features, lengths, self.config.freeze_blocks)[0]

    def add_helper(self, module: nn.Module) -> None:
        """Trains a module that an objective needs along with the model."""
        self.helpers.append(module)
        group = {"params": list(module.parameters()), "weight_decay": 0.0, "scale": 1.0}
        self.optimizer.add_param_group(group)

    def ctc(self, output: Output, batch: Batch, features: Tensor, lengths: Tensor) -> Tensor:
        """The objective of training: CTC, and intermediate CTC where the model has it."""
        factor = self.model.config.total_factor
        return ctc_loss(output, batch, factor, self.config.intermediate_weight)

    def state(self) -> dict[str, Any]:
        """What `load` needs to go on, beside the model's own weights."""
        return {
            "step": self.step, "skipped": int(self.skipped),
            "helpers": self.helpers.state_dict(),
            "average": self.average.model.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.skipped.fill_(state["skipped"])
        self.helpers.load_state_dict(state.get("helpers", {}))
        self.average.model.load_state_dict(state["average"])
        scales = [group["scale"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, scale in zip(self.optimizer.param_groups, scales, strict=True):
            group["scale"] = scale  # as asked for now


def spoken_tokens(batch: Batch) -> float:
    """Tokens in a batch's transcripts."""
    return float(batch.target_lengths.sum())
