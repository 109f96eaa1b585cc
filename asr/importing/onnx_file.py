"""A NeMo `.onnx` export, float or quantised, as a checkpoint: its weights are found by node names.

The node that computes with a weight bears the path of its module, whatever the weight is called and
whether equal ones were merged; BatchNorm is folded into the convolution before it. An optimiser's
file has lost those names and is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from asr.importing.archive import MOST_TEXT, ArchiveError, one_line
from asr.importing.nemo import Imported, history_entry
from asr.importing.settings import Plan
from asr.importing.vocabulary import blank_first, pieces_of
from asr.importing.weights import build_model
from asr.network.checkpoint import Checkpoint
from asr.runtime.config import FeatureConfig, ModelConfig
from asr.runtime.foreign import find_tokens, frontend

FOLDED = {
    "weight": 1.0,
    "bias": 0.0,
    "running_mean": 0.0,
    "running_var": 1 - 1e-5,
}  # changes nothing
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
HEAD = "decoder.decoder_layers.0"


def import_onnx(path: str | Path) -> Imported:
    """The model of a NeMo CTC export; tokens.txt or vocab.txt lies beside it.

    With a tokenizer.model of the same pieces beside it the model can be trained further. Raises
    ArchiveError for what is no such export, ValueError for the files beside it.
    """
    path = Path(path)
    try:
        graph = _Graph(onnx.load(str(path)))
    except Exception as error:  # protobuf's and onnx's errors share no class
        raise ArchiveError(f"{path}: not a usable ONNX file: {one_line(error)}") from None
    try:
        state = graph.state()
        plan = plan_of(state, graph)
        tokens, blank = find_tokens(path, len(state[f"{HEAD}.weight"]))
        if blank != len(tokens):
            raise ArchiveError(f"its blank is token {blank}, not the last one as in NeMo")
        plan.vocabulary = tokens
        plan.features = frontend(path, graph.metadata, plan.features.n_mels)
        spm = tokenizer_beside(path, tokens)
        vocabulary = blank_first(tokens, spm)
        model = build_model(state, plan, vocabulary.rows)
    except ArchiveError as error:
        raise ArchiveError(f"{path}: {error}") from None
    notes = list(plan.notes)
    if spm is None and any(len(token) > 1 and token[0] != "<" for token in tokens):
        notes.append("no tokenizer.model beside it: it can be run, not trained further")
    history = [history_entry(path)]
    return Imported(Checkpoint(model, vocabulary.tokenizer, plan.features, history=history), notes)


def tokenizer_beside(path: Path, tokens: list[str]) -> bytes | None:
    """The SentencePiece model in the same folder, None without one."""
    file = path.with_name("tokenizer.model")
    if not file.is_file():
        return None
    with open(file, "rb") as opened:
        data = opened.read(MOST_TEXT)
    if pieces_of(data) != tokens:
        raise ArchiveError("tokenizer.model beside it has other pieces than the list of tokens")
    return data


class _Graph:
    """Nodes and constants of an export."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        self.inputs = {x.name: x for x in graph.input}
        self.nodes = list(graph.node)
        self.names = {node.name for node in self.nodes}
        self.maker = {name: node for node in self.nodes for name in node.output}
        self._constants = {x.name: x for x in graph.initializer}
        self.quantised = False

    def n_mels(self) -> int:
        shape = self.inputs["audio_signal"].type.tensor_type.shape.dim
        return shape[1].dim_value if len(shape) == 3 else 0

    def constant(self, name: str) -> np.ndarray[Any, Any] | None:
        """The float32 value of a name that depends on no input; integers with their scale."""
        if name in self._constants:
            stored: np.ndarray[Any, Any] = numpy_helper.to_array(self._constants[name])
            if name.endswith("_quantized"):
                self.quantised = True
                stem = name.removesuffix("_quantized")
                scale, zero = (self._constants.get(stem + end) for end in ("_scale", "_zero_point"))
                if scale is None or zero is None:
                    raise ArchiveError(f"{name} has no scale and zero point")
                return dequantise(stored, numpy_helper.to_array(scale), numpy_helper.to_array(zero))
            return stored.astype(np.float32) if stored.dtype.kind == "f" else None
        node = self.maker.get(name)
        if node is None or not node.input:
            return None
        if node.op_type in ("Identity", "Cast", "Reshape", "Transpose"):
            value = self.constant(node.input[0])
            if value is not None and node.op_type == "Transpose":
                value = np.transpose(
                    value, next(a.ints for a in node.attribute if a.name == "perm")
                )
            return value
        if node.op_type == "DequantizeLinear" and node.input[0] in self._constants:
            self.quantised = True
            q, scale, zero = (
                numpy_helper.to_array(self._constants[x]) if x in self._constants else np.zeros(1)
                for x in (*node.input, "")[:3]
            )
            return dequantise(q, scale, zero)
        return None

    def state(self) -> dict[str, Tensor]:
        """The tensors of the network in NeMo's names."""
        if {"audio_signal", "length"} - self.inputs.keys():
            raise ArchiveError(f"takes {', '.join(self.inputs)[:80]}: no NeMo CTC export")
        found: dict[str, np.ndarray[Any, Any]] = {}
        for node in self.nodes:
            module = module_of(node.name)
            values = [self.constant(name) if name else None for name in node.input]
            for key, value in self._tensors(node, values, module, found):
                if value is not None:
                    found[f"{module}.{key}"] = value
        layers = {name.split(".")[2] for name in found if name.startswith("encoder.layers.")}
        if f"{HEAD}.weight" not in found or not layers:
            raise ArchiveError(
                "its nodes have no names of modules, so the weights cannot be told apart: an "
                "optimiser (onnxsim, onnxruntime) or another exporter made it; take NeMo's own file"
            )
        for layer in layers:
            for name, value in FOLDED.items():
                key = f"encoder.layers.{layer}.conv.batch_norm.{name}"
                channels = found[f"encoder.layers.{layer}.conv.depthwise_conv.weight"].shape[0]
                found.setdefault(key, np.full(channels, value, np.float32))
        return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in found.items()}

    def _tensors(
        self, node: onnx.NodeProto, values: list[Any], module: str, found: dict[str, Any]
    ) -> list[tuple[str, Any]]:
        """What of its module a node holds."""
        kind = node.op_type
        values = [*values, None, None]
        if kind == "LayerNormalization":
            return [("weight", values[1]), ("bias", values[2])]
        if kind == "BatchNormalization":
            return list(zip(BATCH_NORM, values[1:5], strict=True))
        if kind == "Conv":
            return [("weight", values[1]), ("bias", values[2])]
        if kind == "ConvInteger":
            add = self.maker.get(f"{node.name.removesuffix('_quant')}_output_0")
            bias = next((b for x in add.input if (b := self.constant(x)) is not None), None) if (
                add is not None and add.op_type == "Add") else None  # fmt: skip
            return [("weight", values[1]), ("bias", None if bias is None else bias.ravel())]
        if kind in ("MatMul", "MatMulInteger") and values[1] is not None:
            return [("weight", values[1].T)]
        if kind == "Add":
            value = next((v for v in values if v is not None), None)
            if module.endswith("self_attn"):
                first = f"{module}.pos_bias_u" not in found
                return [("pos_bias_u" if first else "pos_bias_v", value)]
            if f"{module}.weight" in found and value is not None and value.ndim == 1:
                return [("bias", value)]
        return []


def dequantise(
    q: np.ndarray[Any, Any], scale: np.ndarray[Any, Any], zero: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """(q - zero) * scale, with one for all, or one for each column of a matrix or channel."""
    if scale.size > 1:
        axis = 1 if q.ndim == 2 else 0
        shape = [-1 if i == axis else 1 for i in range(q.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    result: np.ndarray[Any, Any] = (q.astype(np.float32) - zero.astype(np.float32)) * scale
    return result


def module_of(node: str) -> str:
    """`/encoder/pre_encode/conv/conv.0/Conv` belongs to encoder.pre_encode.conv.0."""
    parts: list[str] = []
    for part in node.strip("/").split("/")[:-1]:
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    path = ".".join(parts).removeprefix("encoder.").removeprefix("decoder.")
    return f"decoder.{path}" if path.startswith("decoder_layers") else f"encoder.{path}"


def plan_of(state: dict[str, Tensor], graph: _Graph) -> Plan:
    """Dimensions from the shapes, xscaling from the nodes; ArchiveError for what is missing."""
    layer = "encoder.layers.0"
    try:
        stem = "encoder.pre_encode.conv."
        convs = [x for n, x in state.items() if n.startswith(stem) and n.endswith("weight")]
        separable = any(x.shape[2:] == (1, 1) for x in convs)
        stages = 1 + (len(convs) - 1) // 2 if separable else len(convs)
        width = state[f"{layer}.norm_out.weight"].numel()
        config = ModelConfig(
            vocab_size=len(state[f"{HEAD}.weight"]),
            n_mels=graph.n_mels(),
            d_model=width,
            n_layers=len({n.split(".")[2] for n in state if n.startswith("encoder.layers.")}),
            n_heads=len(state[f"{layer}.self_attn.pos_bias_u"]),
            ff_expansion=len(state[f"{layer}.feed_forward1.linear1.weight"]) // width,
            conv_kernel_size=state[f"{layer}.conv.depthwise_conv.weight"].shape[-1],
            subsampling="dw_striding" if separable else "striding",
            subsampling_factor=2**stages,
            subsampling_channels=len(convs[0]),
        )
    except (KeyError, IndexError) as error:
        raise ArchiveError(f"no weights were found for {error}: no NeMo Conformer export") from None
    except ValueError as error:
        raise ArchiveError(f"a model that cannot be expressed: {error}") from None
    scaled = [n for n in graph.names if n.endswith("pos_enc/Mul")]
    bias = f"{layer}.feed_forward1.linear1.bias" in state
    notes = ["quantised weights were turned into float32: what they lost stays lost"]
    return Plan(
        FeatureConfig(n_mels=config.n_mels), config, [], "decoder.", bool(scaled), bias,
        notes if graph.quantised else [],
    )  # fmt: skip
