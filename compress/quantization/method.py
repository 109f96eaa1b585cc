"""Weights as integers times scales: int8, int4, int2, ternary; or every number as fp16.

- int8: one scale an output channel, activations quantised at run time as ONNX's
  DynamicQuantizeLinear does, exact integer products (Jacob et al. 2018, arXiv 1712.05877).
- int4: groups along the input, the scale of least squared error, weights dequantised at run time.
- int2: likewise, with a zero point of each group, which may lie between two integers (`rounding`).
- ternary {-1, 0, 1}: likewise, the best scale is known exactly (Li et al. 2016, arXiv 1605.04711).
- fp16: every number rounded to half precision; computed in float32.

Convolutions are stored in int8, scales, biases and norms rounded to fp16. With
`activation_aware`, calibration speech weighs the errors (`rounding`). With fine-tuning,
training sees the quantised weights (`fakequant`), with `co_training` those of several precisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from asr.network.checkpoint import Checkpoint
from compress import core
from compress.calibration import input_grams, need
from compress.finetuning import SHARE, Options
from compress.quantization import fakequant, rounding
from compress.quantization.equalization import equalize
from compress.quantization.layers import Int8Linear, QuantLinear, quantized_conv
from compress.quantization.rounding import GROUP_SIZES

PRECISIONS = ("int8", "int4", "int2", "ternary", "fp16")
PACKED = PRECISIONS[:-1]
ENDS = "subsampling.*,head"
FINE_SHARE = 1 / 16  # of the learning rate in training, for precisions of small steps


@dataclass(frozen=True)
class Config(core.Selection):
    """Options of quantization."""

    precision: str = field(
        default="int8", metadata={"help": "how weights are stored", "choices": PRECISIONS}
    )
    group_size: int = field(
        default=0, metadata={"help": "weights a scale (0: 32 for int4 and int2, 64 for ternary)"}
    )
    ends: str = field(
        default="int8",
        metadata={
            "help": "precision of the subsampling and the output layer below int8",
            "choices": ("int8", "same"),
        },
    )
    asymmetric: bool = field(
        default=False, metadata={"help": "a zero point beside the scale (int8, int4; int2 has one)"}
    )
    activation_aware: bool = field(
        default=False, metadata={"help": "weigh errors by calibration speech (int4, int2, ternary)"}
    )
    co_training: str = field(
        default="",
        metadata={
            "help": "precisions, as 'int8,int4', at which fine-tuning trains the weights too"
        },
    )

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.ends not in ("int8", "same"):
            raise ValueError(f"ends {self.ends!r} is not one of int8, same")
        grouped = self.precision in GROUP_SIZES
        if self.group_size and not grouped:
            raise ValueError(f"group_size is for int4, int2 and ternary, not {self.precision}")
        if self.group_size and self.group_size not in GROUP_SIZES[self.precision]:
            allowed = ", ".join(map(str, sorted(GROUP_SIZES[self.precision])))
            raise ValueError(
                f"group_size {self.group_size} of {self.precision} is not one of {allowed}"
            )
        if self.asymmetric and self.precision not in ("int8", "int4"):
            raise ValueError(f"asymmetric is for int8 and int4, not {self.precision}")
        if self.activation_aware and not grouped:
            raise ValueError(
                f"activation_aware is for int4, int2 and ternary, not {self.precision}"
            )
        for other in self.others:
            if other not in PACKED or other == self.precision:
                allowed = ", ".join(p for p in PACKED if p != self.precision)
                raise ValueError(
                    f"co_training {other!r} beside {self.precision} is not one of {allowed}"
                )
        if self.others and not grouped:
            raise ValueError(f"co_training is for int4, int2 and ternary, not {self.precision}")

    @property
    def others(self) -> tuple[str, ...]:
        """The precisions of co-training."""
        return tuple(part.strip() for part in self.co_training.split(",") if part.strip())

    @property
    def needs_calibration(self) -> bool:
        return self.activation_aware

    def at(self, name: str) -> tuple[str, int, bool]:
        """Precision, group size (0: the whole row) and asymmetry of a layer."""
        if self.precision == "int8":
            return "int8", 0, self.asymmetric
        if self.ends == "int8" and core.selected(name, ENDS):
            return "int8", 0, False
        group_size = self.group_size or GROUP_SIZES[self.precision][0]
        return self.precision, group_size, self.asymmetric or self.precision == "int2"


def learning_rate_share(config: Config) -> float:
    """Where rounding loses little, large steps of training lose more than they mend."""
    return FINE_SHARE if config.precision in ("int8", "int4") else SHARE


def check(checkpoint: Checkpoint, config: Config, tuning: Options) -> None:
    """Raises ValueError for training that is not to take place."""
    if config.others and not tuning.fine_tune_epochs:
        raise ValueError("co_training is for fine-tuning: give fine_tune_epochs above 0 as well")


def apply(
    model: nn.Module, config: Config, calibration: core.Calibration | None = None
) -> nn.Module:
    """Replaces Linears and convolutions by integer ones, rounds all that is left to fp16."""
    return _apply(model, config, calibration, training=False)


def prepare(
    model: nn.Module, config: Config, calibration: core.Calibration | None = None
) -> nn.Module:
    """`apply` for quantisation-aware training: Linears become `FakeQuantLinear`."""
    return _apply(model, config, calibration, training=True)


def freeze(model: nn.Module, config: Config) -> nn.Module:
    """Turns every `FakeQuantLinear` into the layer that is stored, with the same weights."""
    if config.precision == "fp16":
        return apply(model, config)
    for name, fake in list(model.named_modules()):
        if isinstance(fake, fakequant.FakeQuantLinear):
            cls = Int8Linear if fake.precision == "int8" else QuantLinear
            stored = cls.from_values(fake.quantized(), fake.bias, fake.precision, fake.group_size)
            core.replace(model, name, stored)
    core.round_rest(model)
    return model


def _apply(
    model: nn.Module, config: Config, calibration: core.Calibration | None, training: bool
) -> nn.Module:
    chosen = core.layers(model, config.include, config.exclude, (nn.Linear, *core.CONVOLUTIONS))
    grams: dict[str, Tensor] = {}
    if config.activation_aware:
        calibration = need(calibration, "activation_aware")
        names = [n for n, m in chosen if type(m) is nn.Linear and config.at(n)[0] != "int8"]
        grams = input_grams(model, calibration, names)
        grams = equalize(model, grams, lambda name, *given: approximation(config, name, *given))
    names = [name for name, _ in chosen]
    del chosen  # each layer is freed once it is replaced
    for name in core.progress(names):
        layer = model.get_submodule(name)
        if config.precision == "fp16":
            core.round_own(layer)
        elif isinstance(layer, nn.Conv1d | nn.Conv2d):
            core.replace(model, name, quantized_conv(layer))
        else:
            assert isinstance(layer, nn.Linear)
            kind = config.at(name)
            others = config.others if kind[0] == config.precision else ()
            also = others if training else None
            replacement = quantized_linear(layer, *kind, grams.get(name), also)
            core.replace(model, name, replacement)
    core.round_rest(model)
    return model


def why_kept(model: nn.Module, name: str, config: Config) -> str:
    """Why a layer is as large as it was; "" where it was not selected."""
    selected = core.selected(name, config.include, config.exclude)
    return "was in half precision before" if selected else ""


def approximation(config: Config, name: str, weight: Tensor, importance: Tensor) -> Tensor:
    """What a layer's weight becomes (out, in), its columns' errors weighed by `importance`."""
    precision, group_size, asymmetric = config.at(name)
    values = rounding.grouped(weight, precision, group_size, asymmetric, importance)
    return rounding.dequantize(*values, group_size)


def quantized_linear(
    linear: nn.Linear, precision: str, group_size: int, asymmetric: bool,
    gram: Tensor | None = None, also: Sequence[str] | None = None,
) -> nn.Module:  # fmt: skip
    """The layer in place of a Linear: to be stored, or to be trained at more precisions if any."""
    weight = linear.weight.detach()
    group_size = group_size or linear.in_features
    if gram is None:
        values = rounding.grouped(weight, precision, group_size, asymmetric)
    else:
        values = rounding.compensated(weight, precision, group_size, asymmetric, gram)
    if also is not None:
        return fakequant.FakeQuantLinear.from_values(linear, values, precision, group_size, also)
    cls = Int8Linear if precision == "int8" else QuantLinear
    return cls.from_values(values, linear.bias, precision, group_size)
