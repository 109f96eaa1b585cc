"""NeMo's own Conformer out of an unpacked wheel, without NeMo's hundred dependencies.

pip download --no-deps nemo_toolkit==3.0.0; unzip nemo_toolkit-*.whl -d FOLDER; encoder(FOLDER, ...)

Its encoder needs torch alone; what else it imports (configuration, type checks, logging, adapters)
is replaced by stand-ins that do nothing. For checking an import against NeMo's own network code.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

REAL = (
    "nemo.collections.asr.modules.conformer_encoder",
    "nemo.collections.asr.parts.mixins.streaming",
    "nemo.collections.asr.parts.utils.activations",
    "nemo.collections.asr.parts.utils.regularization_utils",
    *(f"nemo.collections.asr.parts.submodules.{name}" for name in (
        "conformer_modules", "multi_head_attention", "subsampling", "causal_convs", "batchnorm",
    )),
)  # fmt: skip


NO = {name: lambda self, *_: False for name in ("is_access_enabled", "is_adapter_available")}
SPECIAL: dict[str, Any] = {
    "NeuralModule": type("NeuralModule", (nn.Module,), dict(NO)),
    "avoid_float16_autocast_context": nullcontext, "activation_registry": {"swish": nn.SiLU},
}  # fmt: skip


class _StandIn(ModuleType):
    """A module, function or decorator that does nothing; its names are such, or empty classes."""

    __path__ = ()  # type: ignore[assignment]

    def __call__(self, *args: Any, **_: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in SPECIAL:  # classes may be inherited from, so each is its own
            SPECIAL[name] = type(name, (), dict(NO)) if name[0].isupper() else _StandIn(name)
        return SPECIAL[name]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, *_: Any) -> Any:
        if name.split(".")[0] not in ("nemo", "omegaconf"):
            return None
        if name in REAL:
            path = self.folder.joinpath(*name.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, path)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def encoder(folder: str | Path, **settings: Any) -> nn.Module:
    """NeMo's ConformerEncoder of the wheel unpacked in `folder`: one version a process."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(Path(folder)))
    module = importlib.import_module(REAL[0])
    built: nn.Module = module.ConformerEncoder(**settings)
    return built


class ConformerCTC(nn.Module):
    """The encoder and NeMo's CTC decoder, a convolution of kernel 1 and a log-softmax."""

    def __init__(self, folder: str | Path, num_classes: int, **settings: Any) -> None:
        super().__init__()
        self.encoder = encoder(folder, **settings)
        self.decoder = nn.Module()
        head = nn.Conv1d(settings["d_model"], num_classes + 1, kernel_size=1)
        layers: Any = nn.Sequential(head)
        self.decoder.decoder_layers = layers

    def forward(self, audio_signal: Any, length: Any) -> Any:
        """(B, n_mels, T) and (B,) to log-probabilities (B, T', V + 1), blank last."""
        encoded = self.encoder(audio_signal=audio_signal, length=length)[0]  # (B, D, T')
        layers: Any = self.decoder.decoder_layers
        return layers(encoded).transpose(1, 2).log_softmax(dim=-1)
