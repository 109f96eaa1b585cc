"""Configuration of features and model: frozen dataclasses of plain ints, floats and strings."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text",
         tuple: "a list of numbers"}  # fmt: skip


def check_types(config: Any) -> None:
    """Raises ValueError for a field of another type than its default; floats may be whole."""
    for f in fields(config):
        value, kind = getattr(config, f.name), type(f.default)
        whole = kind is float and type(value) is int
        if not (type(value) is kind or whole) or (kind is float and not math.isfinite(value)):
            raise ValueError(f"{f.name} {value!r} must be {KINDS[kind]}")


@dataclass(frozen=True)
class FeatureConfig:
    """The frontend, in NeMo's convention (see `asr.runtime.features`)."""

    sample_rate: int = 16000
    n_mels: int = 80
    n_fft: int = 512
    win_length: int = 400
    hop_length: int = 160
    preemphasis: float = 0.97
    last_frame: bool = True  # the one at the very end: n // hop_length + 1 frames, else one less
    padding: str = "zeros"  # beyond either end, or "reflect": the waveform mirrored
    normalization: str = "per_feature"  # over the utterance, or "none", or "fixed": see features.py
    mean: tuple[float, ...] = ()  # with "fixed", of each mel bin
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_types(self)
        if not 0 < self.win_length <= self.n_fft:
            raise ValueError(f"win_length {self.win_length} must lie in 1..n_fft ({self.n_fft})")
        if min(self.sample_rate, self.n_mels, self.hop_length) < 1:
            raise ValueError("sample_rate, n_mels and hop_length must be positive")
        for name, allowed in (
            ("padding", ("zeros", "reflect")), ("normalization", ("per_feature", "none", "fixed"))
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is not {' or '.join(allowed)}")
        size = self.n_mels if self.normalization == "fixed" else 0
        if not len(self.mean) == len(self.std) == size:
            raise ValueError(f"mean and std have {len(self.mean)} and {len(self.std)}, not {size}")
        if not all(math.isfinite(x) for x in self.mean) or not all(0 < x < 1e9 for x in self.std):
            raise ValueError("mean must hold finite numbers, std positive ones")


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a Conformer-CTC; the defaults are the `small` preset (NeMo's Conformer-S)."""

    vocab_size: int = 29
    n_mels: int = 80
    d_model: int = 176
    n_layers: int = 16
    n_heads: int = 4
    ff_expansion: int = 4
    conv_kernel_size: int = 31
    subsampling: str = "striding"  # or "dw_striding": depthwise-separable after the first stage
    subsampling_factor: int = 4
    subsampling_channels: int = 176
    reduction_position: int = 0  # after so many blocks, frames are merged; 0: nowhere
    reduction_factor: int = 1  # so many neighbouring frames become one
    reduction_d_model: int = 0  # width of the blocks after it; 0: d_model
    plain_blocks: int = 0  # so many first blocks attend without relative positions
    dropout: float = 0.1
    intermediate_layers: tuple[int, ...] = ()  # CTC heads after these blocks, counted from 1
    self_conditioned: bool = False  # feed the intermediate posteriors back into the encoder
    share_layers: int = 0  # so many blocks stored, used in turn at every depth; 0: one for each
    own_norms: bool = False  # of shared blocks: LayerNorms for each depth

    def __post_init__(self) -> None:
        if isinstance(self.intermediate_layers, list):
            object.__setattr__(self, "intermediate_layers", tuple(self.intermediate_layers))
        check_types(self)
        for name in ("vocab_size", "n_mels", "d_model", "n_layers", "n_heads", "ff_expansion",
                     "conv_kernel_size", "subsampling_channels"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.d_model % self.n_heads or self.d_model % 2:
            raise ValueError(
                f"d_model {self.d_model} must be even and divisible by n_heads {self.n_heads}"
            )
        if self.conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size {self.conv_kernel_size} must be odd")
        if self.subsampling not in ("striding", "dw_striding"):
            raise ValueError(
                f"subsampling {self.subsampling!r} is not one of 'striding', 'dw_striding'"
            )
        if self.subsampling_factor not in (2, 4, 8):
            raise ValueError(f"subsampling_factor {self.subsampling_factor} is not one of 2, 4, 8")
        self._check_reduction()
        if any(type(i) is not int or not 0 < i < self.n_layers for i in self.intermediate_layers):
            raise ValueError(
                f"intermediate_layers {self.intermediate_layers} must lie in 1..{self.n_layers - 1}"
            )
        if not 0 <= self.share_layers <= self.n_layers:
            raise ValueError(
                f"share_layers {self.share_layers} must lie in 0..n_layers ({self.n_layers})"
            )
        if self.own_norms and not self.share_layers:
            raise ValueError("own_norms is for shared blocks: give share_layers as well")
        if self.self_conditioned and not self.intermediate_layers:
            raise ValueError("self_conditioned needs intermediate_layers")
        if any(i <= self.reduction_position for i in self.intermediate_layers):
            raise ValueError(
                f"intermediate_layers {self.intermediate_layers} must lie behind "
                f"reduction_position {self.reduction_position}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must lie in [0, 1)")

    def _check_reduction(self) -> None:
        if self.reduction_factor not in (1, 2, 4):
            raise ValueError(f"reduction_factor {self.reduction_factor} is not one of 1, 2, 4")
        if not 0 <= self.reduction_position < self.n_layers:
            raise ValueError(
                f"reduction_position {self.reduction_position} must lie in 0..{self.n_layers - 1}"
            )
        if self.share_layers and (self.reduction_position or self.plain_blocks):
            raise ValueError("share_layers goes with neither reduction_position nor plain_blocks")
        if not 0 <= self.plain_blocks <= self.n_layers:
            raise ValueError(f"plain_blocks {self.plain_blocks} must lie in 0..{self.n_layers}")
        if (self.reduction_position > 0) != (self.reduction_factor > 1):
            raise ValueError("reduction_position and a reduction_factor above 1 need one another")
        d = self.reduction_d_model
        if d < 0 or d % self.n_heads or d % 2 or (d and not self.reduction_position):
            raise ValueError(
                f"reduction_d_model {d} must be even, divisible by n_heads {self.n_heads}, and 0 "
                "without a reduction"
            )

    @property
    def total_factor(self) -> int:
        """Frames of features that become one frame of log-probabilities."""
        return self.subsampling_factor * self.reduction_factor

    @property
    def d_output(self) -> int:
        """Width of the last block, which the output layer reads."""
        return self.reduction_d_model or self.d_model


FAST: dict[str, Any] = dict(
    conv_kernel_size=9, subsampling="dw_striding", subsampling_factor=8, subsampling_channels=256
)
PRESETS: dict[str, dict[str, Any]] = {
    # 2 M, wide and shallow: what converges in minutes
    "tiny": dict(
        d_model=144, n_layers=4, subsampling="dw_striding", subsampling_channels=32,
        intermediate_layers=(2,), self_conditioned=True,
    ),
    # 6 M: what a CPU trains in hours
    "base": dict(
        d_model=144, n_layers=12, subsampling="dw_striding", subsampling_channels=32,
        intermediate_layers=(6,),
    ),
    # 13 M: NeMo's stt_en_conformer_ctc_small
    "small": dict(d_model=176, n_layers=16, subsampling_channels=176, intermediate_layers=(8,)),
    # 30 M: NeMo's medium
    "medium": dict(d_model=256, n_layers=18, subsampling_channels=256, intermediate_layers=(9,)),
    # 72 M: the size of a 288 MB float32 file
    "large": dict(
        d_model=384, n_layers=19, n_heads=8, subsampling_channels=384, intermediate_layers=(10,),
    ),
    # NeMo's FastConformer, 13 M, 26 M and 109 M: an output frame every 80 ms, so best with BPE
    "fast_small": dict(d_model=176, n_layers=16, intermediate_layers=(8,), **FAST),
    "fast_medium": dict(d_model=256, n_layers=16, intermediate_layers=(8,), **FAST),
    "fast_large": dict(d_model=512, n_layers=17, n_heads=8, intermediate_layers=(9,), **FAST),
}  # fmt: skip


def preset(name: str, **changes: Any) -> ModelConfig:
    """The named preset with `changes` applied; a change of None keeps the preset's value."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    given = {key: value for key, value in changes.items() if value is not None}
    return replace(ModelConfig(**PRESETS[name]), **given)


def config_from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Builds a config dataclass from a checkpoint's or a file's dict, naming unknown keys."""
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown {cls.__name__} keys: {', '.join(unknown)}")
    return cls(**values)


def config_to_dict(config: Any) -> dict[str, Any]:
    """JSON types only: tuples become lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
