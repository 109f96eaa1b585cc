"""How to train, in one dataclass: each field is a flag of train.py and a key of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from asr.runtime.cli import number
from asr.runtime.config import check_types
from asr.training.augment import AugmentConfig

# kinds of augmentation whose flag is a share of the utterances
SHARES = ("silence", "reverb", "babble", "noise", "clip", "telephone", "codec", "level")


def _flag(default: Any, help: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help, **extra})


BATCHES = ("batch_size", "batch_seconds", "accumulate")  # what divides an epoch into steps


@dataclass(frozen=True)
class TrainConfig:
    """How to train; each field is a flag of train.py."""

    epochs: int = _flag(50, "passes over the training data")
    batch_size: int = _flag(16, "most utterances in a batch")
    batch_seconds: float = _flag(240.0, "most seconds of audio in a batch, padding included")
    accumulate: int = _flag(1, "batches whose gradients make one step")
    learning_rate: float = _flag(1e-3, "peak learning rate")
    optimizer: str = _flag("adamw", "optimiser", choices=("adamw", "adam"))
    weight_decay: float = _flag(1e-2, "AdamW's decay of matrices")
    scheduler: str = _flag("cosine", "after the warm-up", choices=("cosine", "noam", "constant"))
    warmup_steps: int = _flag(500, "steps of linear warm-up")
    grad_clip: float = _flag(5.0, "largest gradient norm")
    intermediate_weight: float = _flag(0.3, "share of the intermediate CTC in the loss")
    ema: float = _flag(0.999, "decay of the averaged weights that are kept; 0 keeps the last ones")
    corpus_weights: str = _flag(
        "", "how often an epoch reads a corpus, 'common_voice=2,minds14=0.3': a name is that of a "
        "manifest without train-; 1 for the others", metavar="NAME=X,…",
    )  # fmt: skip
    freeze_blocks: int = _flag(0, "the stem and so many blocks keep their batch statistics and…")
    freeze_epochs: int = _flag(0, "…for so many epochs their weights: they hear an utterance once")
    front_rate: float = _flag(0.1, "share of the learning rate at which they learn afterwards")
    teacher: str = _flag(
        "", "another network to learn from: .onnx, or MODULE:FUNCTION that is given a waveform"
    )
    teacher_output: str = _flag("", "which output of an .onnx: one vector a frame", metavar="NAME")
    teacher_weight: float = _flag(1.0, "of the distance from it, beside CTC")
    teacher_block: int = _flag(0, "the block that is to give the same; 0: halfway")
    sorted_epochs: int = _flag(1, "first epochs that go from short to long utterances")
    specaugment_start: float = _flag(0.1, "share of the run before SpecAugment begins")
    speed: float = _flag(0.1, "speed perturbation: 1 - x, 1, 1 + x; 0 for none")
    warp: float = _flag(0.05, "vocal-tract warp, up to this share")
    gain: float = _flag(6.0, "random gain in dB")
    silence: float = _flag(0.0, "share of utterances with up to 2 s of silence before and after")
    reverb: float = _flag(0.0, "share of utterances in a reverberant room")
    babble: float = _flag(0.0, "share of utterances with other speakers in the background")
    noise: float = _flag(0.0, "share of utterances with coloured noise")
    clip: float = _flag(0.0, "share of utterances with their peaks cut off")
    telephone: float = _flag(0.0, "share of utterances by telephone: 8 kHz, mu-law or A-law")
    codec: float = _flag(0.0, "share of utterances through MP3 or Opus at low bitrates")
    level: float = _flag(0.0, "share of utterances at a level between -50 and -10 dBFS")
    time_masks: int = _flag(5, "SpecAugment time masks, 5 % of the length each; 0 for none")
    freq_masks: int = _flag(2, "SpecAugment frequency masks of up to 27 bins; 0 for none")
    head_epochs: int = _flag(0, "first epochs that train the output layer alone")
    max_duration: float = _flag(35.0, "longer utterances are left out, seconds")
    patience: int = _flag(0, "stop after so many epochs without a better dev WER; 0 never")
    precision: str = _flag(
        "auto", "bf16 where the processor has it", choices=("auto", "float32", "bf16")
    )
    device: str = _flag("auto", "cpu, cuda, cuda:1 …; auto takes a GPU if there is one")
    compile: bool = _flag(False, "torch.compile feed-forward and attention: for GPUs")
    threads: int = _flag(0, "processor threads; 0 leaves the choice to PyTorch")
    num_workers: int = _flag(2, "processes that read and augment audio")
    seed: int = _flag(0, "seed of weights, order, augmentation and dropout")
    log_every: int = _flag(20, "steps between lines of the log")
    save_every: int = _flag(0, "steps between saves of last.pt within an epoch; 0 once an epoch")
    tensorboard: bool = _flag(True, "write TensorBoard event files")

    def __post_init__(self) -> None:
        check_types(self)
        self.weights()
        for name in ("epochs", "batch_size", "batch_seconds", "accumulate", "learning_rate",
                     "grad_clip", "log_every", "max_duration"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} {getattr(self, name)} must be above 0")
        for name in ("weight_decay", "warmup_steps", "sorted_epochs", "gain", "time_masks",
                     "freq_masks", "head_epochs", "patience", "threads", "num_workers",
                     "save_every", "freeze_blocks", "freeze_epochs", "front_rate",
                     "teacher_weight", "teacher_block"):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must not be below 0")
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)} must lie in [0, 1]")
        for name in ("intermediate_weight", "ema", "specaugment_start", "speed", "warp"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must lie in [0, 1)")
        for name, allowed in (
            ("scheduler", ("cosine", "noam", "constant")),
            ("precision", ("auto", "float32", "bf16")),
            ("optimizer", ("adamw", "adam")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} must be one of {', '.join(allowed)}")

    def weights(self) -> dict[str, float]:
        """corpus_weights as a dict; ValueError for what is none."""
        found: dict[str, float] = {}
        for part in filter(None, self.corpus_weights.split(",")):
            name, _, value = part.partition("=")
            try:
                found[name.strip()] = number(value)
            except ValueError:
                found[name.strip()] = -1.0
            if found[name.strip()] < 0:
                raise ValueError(f"--corpus_weights {part!r} must be NAME=NUMBER")
        return found

    @property
    def augment(self) -> AugmentConfig:
        names = ("speed", "warp", "gain", *SHARES, "time_masks", "freq_masks")
        return AugmentConfig(**{name: getattr(self, name) for name in names})
