"""The network of a model file: what runs it, and what the file says about itself."""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from asr.runtime.config import FeatureConfig, config_from_dict
from asr.runtime.foreign import ForeignModel

Array = npt.NDArray[np.float32]

METADATA_KEY = "asr"  # the ONNX metadata entry with all that `info` needs, as JSON
METADATA_VERSION = 1
OLDEST = [1, 20]  # onnxruntime that runs what the export writes, as in pyproject.toml


@dataclass(frozen=True)
class Info:
    """What a model file says about itself."""

    parameters: int  # 0 where the file does not say
    tokens: list[str]
    features: FeatureConfig
    subsampling_factor: int
    one_at_a_time: bool  # batch mates would change the result (dynamically quantised activations)
    history: tuple[dict[str, Any], ...] = ()  # of a checkpoint: how it was trained and compressed


class Backend(Protocol):
    """Something that runs the network; `info` describes its file."""

    info: Info

    def run(self, features: Array, lengths: npt.NDArray[np.int64]) -> Array:
        """features (B, T, n_mels), lengths (B,) in frames -> log_probs (B, T', V)."""


def open_model(path: Path, threads: int) -> Backend:
    """The file's network on `threads` threads, 0 for all cores.

    Raises ValueError, in one line, for a file that is missing, damaged or of another kind.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such model; name an .onnx or .pt file")
    if path.is_dir():
        raise ValueError(f"{path}: a folder; name the model in it, e.g. {path / 'model.onnx'}")
    if path.suffix == ".onnx":
        return OnnxBackend(path, threads)
    if path.suffix == ".pt":
        return TorchBackend(path, threads)
    raise ValueError(f"{path}: expected a model that ends in .onnx or .pt")


class OnnxBackend:
    """An exported model in onnxruntime: ours, or one of NeMo's (see `asr.runtime.foreign`)."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        try:
            self._session = open_session(path, threads)
        except Exception as error:  # onnxruntime's errors share no class of their own
            raise ValueError(f"{path}: {explain(str(error), onnxruntime.__version__)}") from None
        metadata = dict(self._session.get_modelmeta().custom_metadata_map)
        self._columns: npt.NDArray[np.intp] | None = None
        if METADATA_KEY in metadata:
            self.info = read_info(path, metadata)
            return
        try:
            foreign = ForeignModel(path, self._session)
        except ValueError:
            raise
        except Exception as error:  # onnxruntime's own
            raise ValueError(
                f"{path}: does not run: {' '.join(str(error).split())[:160]}"
            ) from None
        self._columns = foreign.columns
        factor = foreign.subsampling_factor
        self.info = Info(0, foreign.tokens, foreign.features, factor, one_at_a_time=True)

    def run(self, features: Array, lengths: npt.NDArray[np.int64]) -> Array:
        inputs = {"audio_signal": np.ascontiguousarray(features.transpose(0, 2, 1))}
        outputs: list[Any] = self._session.run(["logprobs"], {**inputs, "length": lengths})
        log_probs: Array = outputs[0]
        return log_probs if self._columns is None else log_probs[..., self._columns]


def open_session(path: Path, threads: int) -> Any:
    """onnxruntime's session of a file, on `threads` threads (0: all cores); raises its errors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # it keeps a plan for every length there ever was
    options.enable_mem_reuse = False  # a plan that takes most of the loading; the arena reuses too
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    give_memory_back()
    return session


def give_memory_back() -> None:
    """Returns to the system what loading took and freed: glibc keeps it, other libraries do not."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # no such function there
        ctypes.CDLL(None).malloc_trim(0)


def explain(error: str, version: str) -> str:
    """Why onnxruntime of a `version` cannot load a file, from its error, and what to do."""
    reason = " ".join(error.split())
    newer = re.search(
        r"Unsupported model IR version: \d+|support for domain \S+ is till opset \d+|"
        r"\S+ is not a registered function/op|No Op registered for \S+",
        reason,
    )
    if newer is None:
        return f"not a usable ONNX file, truncated or damaged; export it again ({reason[:160]})"
    if [int(part) for part in version.split(".")[:2]] < OLDEST:
        needed = f"needs onnxruntime {OLDEST[0]}.{OLDEST[1]} or newer, {version} is installed"
    else:
        needed = f"needs a newer onnxruntime than {version}, which is installed"
    return f"{needed}; pip install --upgrade onnxruntime ({newer[0]})"


def read_info(path: Path, metadata: dict[str, str]) -> Info:
    """The description that our export wrote into an ONNX file; ValueError if it is damaged."""
    try:
        values = json.loads(metadata[METADATA_KEY])
        version = values["version"]
        if version > METADATA_VERSION:
            raise ValueError(
                f"written by a newer version (format {version}, this program reads up to "
                f"{METADATA_VERSION}); update the program"
            )
        return Info(
            parameters=int(values["parameters"]),
            tokens=[str(token) for token in values["tokens"]],
            features=config_from_dict(FeatureConfig, values["features"]),
            subsampling_factor=int(values["subsampling_factor"]),
            one_at_a_time=bool(values["one_at_a_time"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: unusable metadata: {error}") from None


class TorchBackend:
    """A checkpoint in torch; `threads` sets torch's number for the whole process."""

    def __init__(self, path: Path, threads: int) -> None:
        try:
            import torch
        except ModuleNotFoundError:
            raise ValueError(
                f"{path}: needs PyTorch, which is not installed here; export it to .onnx with "
                "scripts/export_onnx.py on the computer that trained it, or pip install torch"
            ) from None

        from asr.network.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(path)
        if threads:
            torch.set_num_threads(threads)
        self._model = checkpoint.model
        self.info = Info(
            parameters=count_weights(self._model),
            tokens=checkpoint.tokenizer.tokens,
            features=checkpoint.features,
            subsampling_factor=self._model.config.total_factor,
            one_at_a_time=any(getattr(m, "one_at_a_time", False) for m in self._model.modules()),
            history=tuple(checkpoint.history),
        )

    def run(self, features: Array, lengths: npt.NDArray[np.int64]) -> Array:
        import torch

        with torch.inference_mode():
            output = self._model(torch.from_numpy(features), torch.from_numpy(lengths))
        log_probs: Array = output.log_probs.numpy()
        return log_probs


def count_weights(model: Any) -> int:
    """Weights and biases of a torch model; a packed layer counts the weights it stands for."""
    tensors = [x for n, x in model.named_buffers() if n.endswith(("qweight", "indices"))]
    return sum(int(x.numel()) for x in (*model.parameters(), *tensors))
