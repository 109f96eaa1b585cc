"""A checkpoint as one self-contained ONNX file that NeMo CTC clients and `asr.load` run.

Inputs `audio_signal` (B, n_mels, T) float32 and `length` (B,) int64 in frames; output `logprobs`
(B, T', V) float32 with T' = ceil(T / subsampling_factor). Batch and time are free. Written with
torch 2.13's dynamo exporter; the metadata holds features, tokens and sizes, so a device needs only
this file.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from asr import __version__
from asr.network.checkpoint import Checkpoint, check_finite, load_checkpoint
from asr.network.lean import make_lean
from asr.network.model import ConformerCTC
from asr.network.onnx_file import LARGEST, write_model
from asr.network.onnx_graph import build_graph, stored_bytes, tensors_of
from asr.network.onnx_layers import Int8Conv2d, Int8Linear
from asr.network.parts import Turns
from asr.runtime.backends import METADATA_KEY, METADATA_VERSION, OnnxBackend, count_weights
from asr.runtime.config import config_to_dict
from asr.runtime.decoding import greedy_decode
from asr.runtime.files import write_atomically
from asr.runtime.recognizer import Recognizer

SHAPES = ((2, 201), (1, 1000), (3, 77), (1, 1))  # B, T of the parity check
# differences of log-probabilities, in their standard deviations where those exceed 1
FLOAT_TOLERANCE = 1e-3  # the largest; float models reach 1e-5
INTEGER_TOLERANCE = 0.1  # the mean; roundings of activations may fall to either side


class ExportError(ValueError):
    """A model that could not be exported, or a file that does not compute what the model does."""


@dataclass(frozen=True)
class Parity:
    """One comparison of the file with the model on random features."""

    batch: int
    frames: int
    max_difference: float  # of log-probabilities, valid frames
    mean_difference: float
    same_text: bool
    exact: bool = True  # no activation is rounded to integers

    def __str__(self) -> str:
        texts = "equal" if self.same_text else "differ"
        if self.exact:
            sizes = f"max difference {self.max_difference:.1e}, mean {self.mean_difference:.1e}"
        else:  # one activation on the other side of a rounding moves what follows from it
            sizes = f"mean difference {self.mean_difference:.1e} (int8 rounds; largest not checked)"
        return f"B={self.batch} T={self.frames}: texts {texts}, {sizes}"


@dataclass(frozen=True)
class Exported:
    """A file that was written, its size and that of the checkpoint, and how alike they compute."""

    path: Path
    bytes: int
    checkpoint_bytes: int
    parity: list[Parity]


def export_onnx(model_path: str | Path, output_path: str | Path, compute: str = "int8") -> Exported:
    """Exports a checkpoint file to an `.onnx` file, `tokens.txt` beside it; see `to_onnx`."""
    source, target = Path(model_path), Path(output_path)
    if target.suffix != ".onnx":
        raise ValueError(f"{target}: the name of the exported file must end in .onnx")
    parity = to_onnx(load_checkpoint(source), target, compute)
    return Exported(target, target.stat().st_size, source.stat().st_size, parity)


def to_onnx(checkpoint: Checkpoint, path: str | Path, compute: str = "int8") -> list[Parity]:
    """Writes `path` and `tokens.txt` beside it, whole or not at all; returns the parity check.

    `compute` says how packed layers multiply: "int8" in integers, "float" after unpacking.
    Raises ExportError if the file is larger than its weights explain, or computes something else
    than the model; CheckpointError for weights that are not finite.
    """
    path = Path(path)
    check_finite(checkpoint.model)
    model = prepare(checkpoint.model, compute)
    if (size := stored_bytes(model)) > LARGEST:
        raise ExportError(
            f"its weights take {size / 1e9:.1f} GB, and an ONNX file holds 2: compress it first "
            "(compress.py --method quantization, without --test_data)"
        )
    program = build_graph(model)
    program.metadata_props.clear()
    program.metadata_props.update(metadata(checkpoint, model))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".onnx")
    os.close(handle)
    temporary = Path(name)
    try:
        with open(temporary, "wb") as file:
            write_model(program, file)
        check_size(temporary, model)
        exact = not has_integers(model)
        del program, model  # large ones' memory is needed for the comparison
        rows = check_parity(checkpoint.model, temporary, exact)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    tokens = "".join(f"{token} {i}\n" for i, token in enumerate(checkpoint.tokenizer.tokens))
    write_atomically(path.with_name("tokens.txt"), tokens)
    return rows


def prepare(model: ConformerCTC, compute: str = "int8") -> ConformerCTC:
    """A copy for export: lean modules, packed layers in onnxruntime's operators.

    Of a shared block there is one view for each depth; the views have their tensors in common.
    """
    model = cast(ConformerCTC, as_exported(model, compute))
    model.blocks = nn.ModuleList(view(block, turn) for block, turn in model.depths())
    return model


def as_exported(module: nn.Module, compute: str = "int8") -> nn.Module:
    """A copy of any module of the model as it is exported.

    What stays as it was shares its numbers with the module given. A packed layer is any module with
    a method `onnx_layer(compute)`, "int8" or "float": see `asr.network.onnx_layers`; in torch too
    the copy computes with the integers of the file.
    """
    shared = {
        id(x): nn.Parameter(x.detach(), requires_grad=False) if isinstance(x, nn.Parameter) else x
        for x in tensors_of(module).values()
    }
    holder = nn.Sequential(copy.deepcopy(module, shared)).eval().float()
    for name, part in list(holder.named_modules()):
        if hasattr(part, "onnx_layer"):
            holder.set_submodule(name, part.onnx_layer(compute).eval(), strict=True)
    make_lean(holder)
    return holder[0]


def view(block: nn.Module, turn: int) -> nn.Module:
    """A shared block as it runs in that turn, with the same tensors; another block itself."""
    if not any(isinstance(module, Turns) for module in block.modules()):
        return block
    seen = copy.deepcopy(block, {id(x): x for x in tensors_of(block).values()})
    for name, module in list(seen.named_modules()):
        if isinstance(module, Turns):
            seen.set_submodule(name, module[turn])
    return seen


def metadata(checkpoint: Checkpoint, model: ConformerCTC) -> dict[str, str]:
    """What NeMo clients read, and under one key of our own what `asr.runtime.recognizer` reads."""
    normalization = checkpoint.features.normalization
    ours = {
        "version": METADATA_VERSION,
        "features": config_to_dict(checkpoint.features),
        "tokens": checkpoint.tokenizer.tokens,
        "subsampling_factor": model.config.total_factor,
        "parameters": count_weights(checkpoint.model),
        "one_at_a_time": any(getattr(module, "one_at_a_time", False) for module in model.modules()),
        "steps": [str(entry.get("step")) for entry in checkpoint.history],
    }
    return {
        "model_type": "EncDecCTCModel",
        "vocab_size": str(len(checkpoint.tokenizer)),
        "subsampling_factor": str(model.config.total_factor),
        "normalize_type": {"none": "NA"}.get(normalization, normalization),
        "version": __version__,
        METADATA_KEY: json.dumps(ours, ensure_ascii=False),
    }


def has_integers(model: nn.Module) -> bool:
    """Whether activations are quantised, so that the file is only close to the model."""
    return any(isinstance(module, Int8Linear | Int8Conv2d) for module in model.modules())


def check_size(path: Path, model: ConformerCTC) -> None:
    """The file holds every weight once, in its own type: a folded or copied weight shows here."""
    weights = stored_bytes(model)
    size, blocks = path.stat().st_size, len(model.blocks)
    allowed = weights + 65536 * (blocks + 4)  # the graph needs about 20 kB a block
    if size > allowed:
        raise ExportError(
            f"the ONNX file has {size} bytes where its weights need {weights}: a weight was "
            "unpacked or stored twice; nothing was written"
        )


def check_parity(model: ConformerCTC, path: Path, exact: bool = True) -> list[Parity]:
    """Compares batches through the file with the model's utterances, each alone and unpadded."""
    recognizer = Recognizer(OnnxBackend(path, threads=0))
    random = np.random.default_rng(0)
    rows = []
    for batch, frames in SHAPES:
        sizes = np.linspace(frames, (frames + 1) // 2, batch).astype(int)
        features = [random.standard_normal((n, model.config.n_mels), np.float32) for n in sizes]
        found = recognizer.log_probs(features)
        with torch.inference_mode():
            expected = [model(torch.from_numpy(x)[None]).log_probs[0].numpy() for x in features]
        if [x.shape for x in found] != [x.shape for x in expected]:
            raise ExportError(f"B={batch} T={frames}: the file returns other shapes than the model")
        difference = np.concatenate([abs(x - y) for x, y in zip(found, expected, strict=True)])
        row = Parity(
            batch, frames, float(difference.max()), float(difference.mean()),
            [greedy_decode(x) for x in found] == [greedy_decode(x) for x in expected], exact,
        )  # fmt: skip
        rows.append(row)
        spread = max(1.0, float(np.concatenate(expected).std()))
        good = (
            row.max_difference <= FLOAT_TOLERANCE * spread and row.same_text
            if exact
            else row.mean_difference <= INTEGER_TOLERANCE * spread
        )
        if not good:  # NaN included
            raise ExportError(f"the file computes something else than the model: {row}")
    return rows
