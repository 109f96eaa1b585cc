"""One file that knows its own config, tokens, replaced layers and history.

    {"version": 1, "config": {"features", "model"}, "tokens", "sentencepiece_model" (or None),
     "layers": {name: {"layer", "args"}}, "data": {"train": path}, "history": [...],
     "model": state dict (compress.packing says how), "training": resume state or absent}

`layers` describes how the model differs from a fresh one built from its config; it is computed on
saving, so no compression method writes it and none can forget it. Files hold plain types and
tensors only and are read with weights_only=True.
"""

from __future__ import annotations

import importlib
import pickle
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from asr.network import model as model_module
from asr.network.model import ConformerCTC
from asr.runtime.config import FeatureConfig, ModelConfig, config_from_dict, config_to_dict
from asr.runtime.files import whole_file
from asr.runtime.tokenizer import Tokenizer

VERSION = 1
FORMER = {"quantized": "quantization", "fakequant": "quantization"}  # names in older files


class CheckpointError(ValueError):
    """A file that is no checkpoint, or one that this version cannot read."""


@dataclass
class Checkpoint:
    """A model and all that is known about it."""

    model: ConformerCTC
    tokenizer: Tokenizer
    features: FeatureConfig = field(default_factory=FeatureConfig)
    data: dict[str, str | list[str]] = field(default_factory=dict)  # what it was trained on
    history: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] | None = None


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes the file whole or not at all."""
    contents = checkpoint_contents(checkpoint)
    try:
        with whole_file(path, binary=True) as file:
            torch.save(contents, file)
    except RuntimeError as error:  # torch reports a full disk so
        raise OSError(f"{path}: could not be written: {error}") from error


def checkpoint_contents(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the file holds: plain types and tensors."""
    config = checkpoint.model.config
    contents: dict[str, Any] = {
        "version": VERSION,
        "config": {
            "features": config_to_dict(checkpoint.features), "model": config_to_dict(config)
        },
        "tokens": checkpoint.tokenizer.tokens,
        "sentencepiece_model": checkpoint.tokenizer.sentencepiece_model,
        "layers": layer_map(checkpoint.model),
        "data": checkpoint.data,
        "history": checkpoint.history,
        "model": compress_module("packing").pack_state(checkpoint.model),
    }  # fmt: skip
    if checkpoint.training is not None:
        contents["training"] = checkpoint.training
    return contents


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Builds the model from its config, swaps in the mapped layers, loads the weights strictly."""
    contents = read_checkpoint(path)
    try:
        with torch.device("meta"):
            model = ConformerCTC(config_from_dict(ModelConfig, contents["config"]["model"]))
            for name, entry in contents["layers"].items():  # parents come first
                model.set_submodule(name, build_layer(entry["layer"], entry["args"]), strict=True)
        state = compress_module("packing").unpack_state(contents["model"])
        model.load_state_dict(state, strict=True, assign=True)
        tokenizer = Tokenizer(contents["tokens"], contents["sentencepiece_model"])
        if len(tokenizer) != model.config.vocab_size:
            raise ValueError(
                f"it has {len(tokenizer)} tokens, but {model.config.vocab_size} outputs"
            )
        return Checkpoint(
            model=model.eval(),
            tokenizer=tokenizer,
            features=config_from_dict(FeatureConfig, contents["config"]["features"]),
            data=contents["data"],
            history=contents["history"],
            training=contents.get("training"),
        )
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: not a usable checkpoint: {reason}") from error


def check_finite(model: nn.Module) -> None:
    """A CheckpointError that names the layer with NaN or infinite weights, if there is one."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            layer, _, part = name.rpartition(".")
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"layer {layer}: {bad} of {tensor.numel()} numbers of its {part} are NaN or "
                "infinite: the training diverged or the file is damaged; take an earlier checkpoint"
            )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The file's contents as a dict, checked for kind and version; no code in it is ever run."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; train.py writes one as OUTPUT_DIR/model.pt")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name the checkpoint in it, e.g. model.pt")
    if path.suffix == ".onnx":
        raise CheckpointError(f"{path}: an export is only run; name the .pt that it was made of")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickles, which the errors below tell of
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: not a checkpoint of this project, or unsafe to load (it would run code)"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{path}: unreadable as a checkpoint: truncated or another kind of file ({error!s:.80})"
        ) from None
    version = contents.get("version") if isinstance(contents, dict) else None
    if type(version) is not int or version < 1 or "model" not in contents:
        raise CheckpointError(f"{path}: a PyTorch file, but not a checkpoint of this project")
    if version > VERSION:
        raise CheckpointError(
            f"{path}: written by a newer version (format {version}, this program reads up to "
            f"{VERSION}); update the program"
        )
    return cast(dict[str, Any], contents)


def layer_map(model: ConformerCTC) -> dict[str, dict[str, Any]]:
    """The modules by which `model` differs from a fresh one of its config, parents first."""
    with torch.device("meta"):
        fresh = ConformerCTC(model.config)
        layers: dict[str, dict[str, Any]] = {}
        for name, module in model.named_modules():
            entry = describe_layer(module)
            if not name or entry is None or entry == describe_layer(fresh.get_submodule(name)):
                continue
            layers[name] = entry
            fresh.set_submodule(name, build_layer(entry["layer"], entry["args"]))
    return layers


def describe_layer(module: nn.Module) -> dict[str, Any] | None:
    """How to build the module anew, or None for containers and parameterless modules."""
    if type(module) is nn.Linear:
        args: dict[str, Any] = {
            "in_features": module.in_features,
            "out_features": module.out_features,
            "bias": module.bias is not None,
        }
        return {"layer": "Linear", "args": args}
    if not hasattr(module, "args"):
        return None
    kind = type(module)
    place = kind.__module__.split(".")  # asr.network.FILE, or compress.METHOD and perhaps a file
    room = place[1] if place[0] == "compress" else "model"
    return {"layer": f"{room}.{kind.__name__}", "args": module.args}


def build_layer(layer: str, args: dict[str, Any]) -> nn.Module:
    """An empty module by its name: Linear, one of asr.network.model, or a method's."""
    if layer == "Linear":
        return nn.Linear(**args)
    room, _, name = layer.partition(".")
    if not (room.isidentifier() and name.isidentifier()):
        raise CheckpointError(f"unknown layer {layer!r}")
    try:
        module = model_module if room == "model" else compress_module(FORMER.get(room, room))
        cls = getattr(module, name)
    except (ImportError, AttributeError):
        raise CheckpointError(f"unknown layer {layer!r}: written by another version?") from None
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise CheckpointError(f"unknown layer {layer!r}")
    return cls(**args)


def compress_module(name: str) -> Any:
    """A module of `compress`, imported when needed: the one place where `asr` knows of it."""
    with torch.device("cpu"):  # the caller may build on the meta device; constants must have data
        return importlib.import_module(f"compress.{name}")
