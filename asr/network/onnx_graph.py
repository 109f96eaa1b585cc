"""A prepared model as a lean ONNX graph: tracing, tidying, storing it small.

Tracing costs seconds a block, so equal blocks are traced once, as a function whose inputs are the
block's tensors, and the function is then written out for each of them.
"""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.onnx import ops as onnx_ops

from asr.network.model import ConformerBlock, ConformerCTC
from asr.network.onnx_storage import MIN_SIZE, small_bytes, store_small

OPSET = 20
EXAMPLE = (2, 201)  # B, T of the traced example: an axis that is to stay free may not be 1
ENOUGH_BLOCKS = 3  # equal ones, from which on a function pays
FREE = torch.export.Dim.DYNAMIC


def build_graph(model: ConformerCTC) -> onnx_ir.Model:
    """The ONNX graph of a prepared model, with NeMo's names; batch and time are free."""
    blocks = list(model.blocks)
    with quietly():
        functions = stand_ins(model)
        try:
            graph = trace_model(model)
        finally:
            model.blocks = nn.ModuleList(blocks)
        for function in functions:
            graph.functions[function.identifier()] = function
            graph.graph.opset_imports.update(function.opset_imports)
    tidy(graph)
    store_small(graph)
    drop_shapes(graph)
    return graph


@contextmanager
def quietly() -> Iterator[None]:
    """Tracing without gradients and without the exporter's remarks."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # names packages that are not needed
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def part_graph(module: nn.Module, args: Sequence[Any], others: Sequence[Any]) -> onnx_ir.Model:
    """The graph of one module of a prepared model, traced with args: tensors, numbers or None.

    The tensors are its inputs x0, x1, … by their places. Axes are free where they are of another
    size in `others`, a second call.
    """
    tensors = {f"x{i}": x for i, x in enumerate(args) if isinstance(x, Tensor)}
    free = [
        {axis: FREE for axis in range(x.ndim) if x.shape[axis] != others[i].shape[axis]}
        for i, x in enumerate(args) if isinstance(x, Tensor)
    ]  # fmt: skip
    with quietly():
        graph = export(
            _Part(module, args), (list(tensors.values()),), (free,), input_names=list(tensors)
        )
    tidy(graph)
    return graph


class _Part(nn.Module):
    """A module with the tensors of its arguments only."""

    def __init__(self, module: nn.Module, args: Sequence[Any]) -> None:
        super().__init__()
        self.module = module
        self.others = [None if isinstance(x, Tensor) else (x,) for x in args]

    def forward(self, tensors: list[Tensor]) -> Any:
        given = iter(tensors)
        return self.module(*(next(given) if other is None else other[0] for other in self.others))


class _Traced(nn.Module):
    """The model with NeMo's inputs and its one output."""

    def __init__(self, model: ConformerCTC) -> None:
        super().__init__()
        self.model = model

    def forward(self, audio_signal: Tensor, length: Tensor) -> Tensor:
        log_probs: Tensor = self.model(audio_signal.transpose(1, 2), length).log_probs
        return log_probs


def trace_model(model: ConformerCTC) -> onnx_ir.Model:
    """The whole model as torch exports it."""
    batch, frames = EXAMPLE
    example = (torch.randn(batch, model.config.n_mels, frames), torch.tensor([frames, frames // 2]))
    return export(
        _Traced(model),
        example,
        {"audio_signal": {0: torch.export.Dim("batch"), 2: FREE},
         "length": {0: torch.export.Dim("batch")}},
        input_names=["audio_signal", "length"],
        output_names=["logprobs"],
    )  # fmt: skip


def export(module: nn.Module, example: tuple[Any, ...], shapes: Any, **names: Any) -> onnx_ir.Model:
    """torch.onnx.export by way of torch.export, unoptimised: `tidy` does what is needed."""
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels leave strides that do not decompose
        program = torch.onnx.export(
            module.eval(), example, dynamo=True, opset_version=OPSET, dynamic_shapes=shapes,
            optimize=False, verbose=False, **names,
        )  # fmt: skip
    assert program is not None
    graph: onnx_ir.Model = program.model
    return graph


def stand_ins(model: ConformerCTC) -> list[onnx_ir.Function]:
    """Puts a call of a function in the place of every block that has enough equals."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, block in enumerate(model.blocks):
        groups[signature(block)].append(i)
    functions: list[onnx_ir.Function] = []
    parameters: dict[int, nn.Parameter] = {}  # by what they hold: blocks may share tensors

    def once(x: Tensor) -> nn.Parameter:
        return parameters.setdefault(id(x), nn.Parameter(x, requires_grad=False))

    for numbers in groups.values():
        if len(numbers) < ENOUGH_BLOCKS:
            continue
        first = model.blocks[numbers[0]]
        assert isinstance(first, ConformerBlock)
        name = f"Block{len(functions)}"
        functions.append(trace_block(first, name))
        for i in numbers:
            model.blocks[i] = _Call(name, [once(x) for x in tensors_of(model.blocks[i]).values()])
    return functions


def signature(block: nn.Module) -> str:
    """Equal for blocks that differ in the values of their tensors only."""
    parts = [
        f"{name} {type(module)} "
        + repr({k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers")})
        for name, module in block.named_modules()
        if name
    ]
    parts += [f"{name} {x.dtype} {list(x.shape)}" for name, x in tensors_of(block).items()]
    hidden = any(isinstance(v, Tensor) for module in block.modules() for v in vars(module).values())
    return "\n".join(parts) + (str(id(block)) if hidden else "")


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class _Call(nn.Module):
    """In place of a block: the function `name`, given the block's tensors."""

    def __init__(self, name: str, tensors: list[nn.Parameter]) -> None:
        super().__init__()
        self.name = name
        self.tensors = nn.ParameterList(tensors)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, padding_bias: Tensor, turn: int
    ) -> Tensor:
        return onnx_ops.symbolic(
            f"asr::{self.name}", (x, mask, padding_bias, *self.tensors),
            dtype=torch.float32, shape=x.shape, version=1,
        )  # fmt: skip


class _Body(nn.Module):
    """A block as a function of its tensors too."""

    def __init__(self, block: ConformerBlock) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: its tensors are inputs

    def forward(self, x: Tensor, mask: Tensor, padding_bias: Tensor, tensors: list[Tensor]) -> Any:
        block: ConformerBlock = self.__dict__["block"]
        positions = x  # not used: lean attention makes its own
        state = dict(zip(tensors_of(block), tensors, strict=True))
        return torch.func.functional_call(block, state, (x, positions, mask, padding_bias))


def trace_block(block: ConformerBlock, name: str) -> onnx_ir.Function:
    """The block as the ONNX function asr::`name`."""
    batch, frames = EXAMPLE
    norm: Any = block.norm
    (d_model,) = norm.normalized_shape
    mask = torch.ones(batch, frames, dtype=torch.bool)
    tensors = [x.detach() for x in tensors_of(block).values()]
    graph = export(
        _Body(block),
        (torch.randn(batch, frames, d_model), mask, torch.zeros(batch, 1, 1, frames), tensors),
        ({0: FREE, 1: FREE}, {0: FREE, 1: FREE}, {0: FREE, 3: FREE}, [None] * len(tensors)),
    ).graph
    for value in list(graph.initializers.values()):  # a function holds constants as nodes
        node = onnx_ir.node("Constant", [], {"value": value.const_value})
        graph.insert_before(graph[0], node)
        onnx_ir.convenience.replace_all_uses_with(value, node.outputs[0])
    graph.initializers.clear()
    return onnx_ir.Function("asr", name, "", graph=graph, attributes=[])


def tidy(graph: onnx_ir.Model) -> None:
    """Folds what shapes and types decide, merges equal nodes, and drops names of source files."""
    passes.InlinePass()(graph)
    fold_constants(graph, input_size_limit=MIN_SIZE, output_size_limit=MIN_SIZE)
    for clean in (
        passes.RemoveUnusedNodesPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.IdentityEliminationPass(),
        passes.LiftConstantsToInitializersPass(),
        passes.DeduplicateInitializersPass(size_limit=4096),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        clean(graph)


def drop_shapes(graph: onnx_ir.Model) -> None:
    """Leaves out what every runtime infers: types, shapes and origins of inner values."""
    inner = graph.graph
    ends = {*inner.inputs, *inner.outputs}
    values = [*inner.initializers.values(), *(x for node in inner for x in node.outputs), *ends]
    for value in values:
        value.metadata_props.clear()
        if value not in ends:
            value.type = value.shape = None


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all tensors in the form that `store_small` leaves."""
    return sum(small_bytes(x.detach().cpu().numpy()) for x in tensors_of(model).values())
