"""Gives a Conformer the ears of a trained phoneme recogniser, and writes it as a checkpoint.

    python scripts/teach_front.py --teacher hama_wheel/hama/assets/asr_waveform.hama \
        --data_dir data --output_path runs/start.pt

The teacher is the small Conformer-CTC inside the wheel `hama` 1.7.0 (Apache-2.0): its four blocks
are ours without positions. They become the first blocks here, behind our own features and
a new stem, and both are taught to give the teacher's last hidden layer: the teacher hears the clean
recording, the student what rooms and telephones made of it. No transcript is read. The blocks on
top, at half the rate, and the output layer stay as they were initialised: train.py goes on.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.common.provenance import command_line, commit
from asr.corpus.manifest import Utterance
from asr.corpus.splits import load_dataset
from asr.importing.hama import BLOCKS, WIDTH, Teacher
from asr.measure.machine import provenance
from asr.network.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from asr.network.model import ConformerCTC, count_parameters
from asr.network.parts import valid_mask
from asr.runtime.audio import read_audio
from asr.runtime.cli import Parser, guarded
from asr.runtime.config import FeatureConfig, ModelConfig
from asr.runtime.features import log_mel
from asr.runtime.files import check_writable, write_json
from asr.runtime.tokenizer import ENGLISH, Tokenizer
from asr.training.augment import AugmentConfig, degrade, retime, spec_augment, timing
from asr.training.data import epoch_batches, utterance_rng

AUGMENT = AugmentConfig(
    speed=0.1, warp=0, silence=0.2, reverb=0.1, babble=0.03, noise=0.2, clip=0.03, telephone=0.1,
    codec=0.005, level=0.2, time_masks=0, freq_masks=0,
)  # fmt: skip


@dataclass
class Pair:
    """One batch: what the student hears and what the teacher hears."""

    features: Tensor  # (B, T, n_mels)
    feature_lengths: Tensor
    waveforms: Tensor  # (B, N)
    waveform_lengths: Tensor


class Pairs(torch.utils.data.Dataset[Pair]):
    """Clean recordings and what rooms and telephones made of them, in batches."""

    def __init__(self, utterances: Sequence[Utterance], augment: AugmentConfig, seed: int) -> None:
        self.utterances, self.augment, self.seed = utterances, augment, seed

    def __getitem__(self, key: tuple[int, tuple[int, ...]]) -> Pair:
        epoch, indices = key
        clean, heard = zip(*(self.pair(i, epoch) for i in indices), strict=True)
        return Pair(
            nn.utils.rnn.pad_sequence([torch.from_numpy(x) for x in heard], batch_first=True),
            torch.tensor([len(x) for x in heard]),
            nn.utils.rnn.pad_sequence([torch.from_numpy(x) for x in clean], batch_first=True),
            torch.tensor([len(x) for x in clean]),
        )

    def pair(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = utterance_rng(self.seed, epoch, index)
        waveform = read_audio(self.utterances[index].audio_filepath)
        clean = retime(waveform, timing(rng, self.augment), rng, self.augment.shift)
        clean = clean * np.float32(0.1 / max(float(clean.std()), 1e-4))
        features = log_mel(degrade(clean, rng, self.augment, self.voices))
        return clean, spec_augment(features, rng, self.augment)

    def voices(self, rng: np.random.Generator) -> list[np.ndarray]:
        chosen = rng.integers(0, len(self.utterances), 4)
        return [read_audio(self.utterances[i].audio_filepath) for i in chosen]


def start_model(teacher: Teacher, args: argparse.Namespace) -> ConformerCTC:
    """The teacher's blocks under fresh ones, for characters."""
    layers = BLOCKS + args.upper_blocks
    config = ModelConfig(
        vocab_size=len(Tokenizer.characters(ENGLISH)), d_model=WIDTH, n_layers=layers,
        subsampling_factor=2, subsampling_channels=32, reduction_position=BLOCKS,
        reduction_factor=2, reduction_d_model=args.upper_width, plain_blocks=BLOCKS,
        dropout=args.dropout, intermediate_layers=(BLOCKS + args.upper_blocks // 2,),
        self_conditioned=True,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    model = ConformerCTC(config)
    for own, other in zip(model.blocks, teacher.blocks, strict=False):
        own.load_state_dict(other.state_dict())
    return model


@torch.no_grad()
def fit_stem(teacher: Teacher, model: ConformerCTC, batches: Sequence[Pair]) -> None:
    """The stem's Linear by least squares: the nearest it comes to what the teacher's stem gives.

    Six of the convolution's channels hand on the features as they are, of three frames and either
    sign; the others stay random.
    """
    stem: Any = model.subsampling
    weight = stem.convs[0].weight
    weight[:6] = 0.0
    for channel in range(6):
        weight[channel, 0, channel // 2, 1] = 1.0 - 2.0 * (channel % 2)
        stem.convs[0].bias[channel] = 0.0
    given: list[Tensor] = []
    hook = stem.out.register_forward_pre_hook(lambda _, x: given.append(x[0]))
    size = stem.out.in_features + 1
    gram, moment = torch.zeros(size, size), torch.zeros(size, WIDTH)
    for batch in batches:
        wanted = teacher.stem(batch.waveforms) / math.sqrt(WIDTH)
        stem(batch.features, batch.feature_lengths)
        mask = valid_mask((batch.feature_lengths + 1) // 2, given[-1].shape[1])
        x, y = given.pop()[mask], wanted[:, : mask.shape[1]][mask]
        x = F.pad(x, (0, 1), value=1.0)
        gram += x.T @ x
        moment += x.T @ y
    hook.remove()
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(size)
    solved = torch.linalg.solve(gram, moment)
    stem.out.weight.copy_(solved[:-1].T)
    stem.out.bias.copy_(solved[-1])


@torch.no_grad()
def measure_batch_norms(model: ConformerCTC, batches: Sequence[Pair]) -> None:
    """Gives the batch norms of the front real statistics, and leaves what they compute as it is."""
    blocks: Any = model.blocks[:BLOCKS]
    norms = [block.conv.batch_norm for block in blocks]
    inputs: list[list[Tensor]] = [[] for _ in norms]
    hooks = [
        norm.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0][given[1]]))
        for norm, kept in zip(norms, inputs, strict=True)
    ]
    for batch in batches:
        model.front(batch.features, batch.feature_lengths, BLOCKS)
    for norm, kept, hook in zip(norms, inputs, hooks, strict=True):
        hook.remove()
        old_scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        old_shift = norm.bias - norm.running_mean * old_scale
        mean, var = torch.cat(kept).mean(0), torch.cat(kept).var(0)
        norm.weight.copy_(old_scale * torch.sqrt(var + norm.eps))
        norm.bias.copy_(old_shift + mean * old_scale)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


def distance(teacher: Teacher, model: ConformerCTC, batch: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error a number, divergence of the symbols a frame, and how many frames agree.

    That is of the frames at which the teacher says a phoneme.
    """
    wanted, lengths = teacher(batch.waveforms, batch.waveform_lengths)
    got, _ = model.front(batch.features, batch.feature_lengths, BLOCKS)
    mask = valid_mask(lengths, wanted.shape[1])
    wanted, got = wanted[mask].clone(), got[:, : wanted.shape[1]][mask]
    target, symbols = teacher.symbols(wanted[None])[0], teacher.symbols(got[None])[0]
    divergence = F.kl_div(symbols, target, reduction="batchmean", log_target=True)
    spoken = target.argmax(1) != target.shape[1] - 1
    same = (target.argmax(1) == symbols.argmax(1))[spoken].float().mean()
    return F.mse_loss(got, wanted), divergence, same


def teach(
    teacher: Teacher, model: ConformerCTC, utterances: list[Utterance], args: argparse.Namespace
) -> float:
    """AdamW, cosine; the stem alone for the first sixth of the time, then the blocks along.

    Returns the hours heard.
    """
    pairs = Pairs(utterances, AUGMENT, args.seed)
    front = [model.subsampling, *model.blocks[:BLOCKS]]
    parameters = [
        {"params": front[0].parameters(), "scale": 1.0},
        {"params": [p for block in front[1:] for p in block.parameters()], "scale": 0.3},
    ]
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-3, betas=(0.9, 0.98), fused=True)
    learnt = [p for group in optimizer.param_groups for p in group["params"]]
    durations, begin, seconds, step = [u.duration for u in utterances], time.time(), 0.0, 0
    epoch = 0
    model.eval()  # batch norms keep their statistics
    while True:
        batches = epoch_batches(durations, epoch, 32, 16.0, args.seed, augment=AUGMENT)
        loader = torch.utils.data.DataLoader(
            pairs, batch_size=None, sampler=[(epoch, b) for b in batches],
            num_workers=args.num_workers, worker_init_fn=lambda _: torch.set_num_threads(1),
        )  # fmt: skip
        for batch in loader:
            progress = (time.time() - begin) / (60 * args.minutes)
            if progress >= 1:
                return seconds / 3600
            rate = args.learning_rate * min(1, (step + 1) / 50)
            rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"] * (group["scale"] == 1 or progress > 1 / 6)
            error, divergence, same = distance(teacher, model, batch)
            loss: Any = error + 0.3 * divergence
            loss.backward()
            near = error.item(), divergence.item(), same.item()
            nn.utils.clip_grad_norm_(learnt, 5.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds += float(batch.feature_lengths.sum()) / 100
            step += 1
            if step % 50 == 0:
                print(
                    f"{time.time() - begin:6.0f} s  step {step:5}  {seconds / 3600:5.2f} h heard  "
                    "error {:.4f}  divergence {:.4f}  same phoneme {:.3f}".format(*near),
                    flush=True,
                )  # fmt: skip
        epoch += 1


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    for path in filter(None, (args.output_path, args.report_path)):
        check_writable(path)
    teacher = Teacher(args.teacher)
    utterances = [u for u in load_dataset(args.data_dir, "train") if u.duration <= 20]
    model = load_checkpoint(args.init_from).model if args.init_from else start_model(teacher, args)
    print(f"{count_parameters(model) / 1e6:.2f} M parameters, {len(utterances)} recordings")
    pairs = Pairs(utterances, AUGMENT, args.seed + 2)
    random = np.random.default_rng(args.seed)
    chosen = [tuple(random.integers(0, len(utterances), 8).tolist()) for _ in range(30)]
    if not args.init_from:
        fit_stem(teacher, model, [pairs[0, part] for part in chosen])
    hours = teach(teacher, model, utterances, args)
    pairs = Pairs(utterances, AUGMENT, args.seed + 1)
    some = [pairs[0, tuple(range(i, len(utterances), len(utterances) // 8))] for i in range(4)]
    with torch.no_grad():
        before = [distance(teacher, model, batch) for batch in some]
        measure_batch_norms(model, some)
        after = [distance(teacher, model, batch) for batch in some]
    distances = {}
    for what, rows in (("at_the_end", before), ("batch_norms_measured", after)):
        means = [float(torch.stack(column).mean()) for column in zip(*rows, strict=True)]
        print(f"{what}: " + "error {:.4f}  divergence {:.4f}  same phoneme {:.3f}".format(*means))
        names = ("error", "divergence", "same_phoneme")
        distances[what] = dict(zip(names, (round(mean, 4) for mean in means), strict=True))
    if args.report_path:
        about = {"minutes": args.minutes, "hours_heard": round(hours, 2)}
        write_json(args.report_path, provenance(args.command, args.seed) | about | distances)
    step = {"step": "teach_front", "teacher": Path(args.teacher).name, "minutes": args.minutes,
            "learning_rate": args.learning_rate, "seed": args.seed, "commit": commit()}  # fmt: skip
    tokenizer = Tokenizer.characters(ENGLISH)
    save_checkpoint(args.output_path, Checkpoint(model, tokenizer, FeatureConfig(), {}, [step]))
    print(f"wrote {args.output_path}")
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--teacher", required=True, help="asr_waveform.hama of the wheel hama 1.7.0")
    add("--data_dir", required=True, help="manifests; the train* are heard, their texts not read")
    add("--output_path", required=True, help="checkpoint to write")
    add("--report_path", help="JSON to write: how near the front has come")
    add("--init_from", help="a checkpoint of this script, to teach it further")
    add("--upper_blocks", type=int, default=5, help="fresh blocks on top (%(default)s)")
    add("--upper_width", type=int, default=176, help="their width (%(default)s)")
    add("--dropout", type=float, default=0.05, help="in the blocks (%(default)s)")
    add("--minutes", type=float, default=10.0, help="of teaching (%(default)s)")
    add("--learning_rate", type=float, default=2e-3, help="peak, for the stem (%(default)s)")
    add("--threads", type=int, default=1, help="processor threads (%(default)s)")
    add("--num_workers", type=int, default=1, help="processes that read audio (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, order and augmentation (%(default)s)")
    args = parser.parse_args(argv)
    args.command = command_line("scripts/teach_front.py", argv)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
