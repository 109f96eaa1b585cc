"""Tensors of an ONNX graph in the fewest bytes, expanded by nodes that a runtime folds on loading.

Nothing here changes a value. An initializer is written in the smallest of these forms:

- float32 values that fp16 holds exactly as fp16, and a Cast;
- 8-bit integers of 0 ... levels - 1 as several digits a byte: shifted out of fields of 4, 2 and 1
  bits, or looked up where a base packs tighter (five ternary ones);
- a mask of one bit an element, and the values that differ from the most frequent one (pruning);
- one value and a shape, where all elements are equal.

All but the look-ups stays in 8 bits, since onnxruntime keeps what it folds until the last node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir

Array = npt.NDArray[Any]

MIN_SIZE = 256  # elements from which on nodes are smaller than what they save
NODE_BYTES = 400  # that the nodes of a form may take
SPARSE_NODE_BYTES = 2000
SHARED = 16384  # bytes of a constant up to which it is looked for among the others


def store_small(graph: onnx_ir.Model) -> None:
    """Stores every initializer in its smallest form."""
    nodes = _Nodes(graph.graph)
    for name, value in list(graph.graph.initializers.items()):
        if value.const_value is None or value.const_value.size < MIN_SIZE:
            continue
        array = value.const_value.numpy()
        form = smallest(array)
        if form.bytes + NODE_BYTES < array.nbytes:
            onnx_ir.convenience.replace_all_uses_with(value, form.expand(nodes, array.shape))
            del graph.graph.initializers[name]
    nodes.insert()


def small_bytes(array: Array) -> int:
    """Bytes of a tensor as `store_small` leaves it."""
    if array.size < MIN_SIZE:
        return array.nbytes
    form = smallest(array)
    return form.bytes if form.bytes + NODE_BYTES < array.nbytes else array.nbytes


class _Nodes:
    """Nodes to be put before all others, and their initializers, small ones that are equal once."""

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[onnx_ir.Node] = []
        self.shared: dict[Any, onnx_ir.Value] = {}

    def constant(self, array: Array) -> onnx_ir.Value:
        contents = array.tobytes() if array.nbytes <= SHARED else len(self.shared)  # no equals
        key = (array.dtype.str, array.shape, contents)
        if key not in self.shared:
            name = f"stored_{len(self.shared)}"
            tensor = onnx_ir.tensor(array, name=name)
            self.shared[key] = onnx_ir.Value(name=name, const_value=tensor)
            self.graph.register_initializer(self.shared[key])
        return self.shared[key]

    def add(self, kind: str, *inputs: onnx_ir.Value | Array, **attributes: Any) -> onnx_ir.Value:
        values = [self.constant(x) if isinstance(x, np.ndarray) else x for x in inputs]
        self.nodes.append(onnx_ir.node(kind, values, attributes))
        return self.nodes[-1].outputs[0]

    def insert(self) -> None:
        if self.nodes:
            self.graph.insert_before(self.graph[0], self.nodes)


@dataclass
class Plain:
    """The array as it is, or as fp16."""

    array: Array
    half: bool

    @property
    def bytes(self) -> int:
        return self.array.nbytes // (2 if self.half else 1)

    def expand(self, nodes: _Nodes, shape: tuple[int, ...]) -> onnx_ir.Value:
        if not self.half:
            return nodes.constant(self.array.reshape(shape))
        half = nodes.constant(self.array.reshape(shape).astype(np.float16))
        return nodes.add("Cast", half, to=onnx_ir.DataType.FLOAT)


@dataclass
class Filled:
    """One value everywhere, as where a whole layer was pruned."""

    value: Array  # (1,)

    @property
    def bytes(self) -> int:
        return self.value.nbytes

    def expand(self, nodes: _Nodes, shape: tuple[int, ...]) -> onnx_ir.Value:
        return nodes.add("Expand", self.value, np.array(shape, np.int64))


@dataclass
class Digits:
    """8-bit values from `low` up, in fields of bits (from 0) or in a base; packed along axis 0."""

    array: Array
    levels: int
    low: int = 0

    @property
    def in_base(self) -> bool:
        return bits_of(self.levels) * digits_per_byte(self.levels) > 8

    @property
    def bytes(self) -> int:
        per_byte = [digits_per_byte(self.levels)] if self.in_base else [8 // w for w in self.widths]
        rows = self.array.shape[0] if self.array.ndim else 1
        return sum(-(-rows // n) * self.array.size // max(rows, 1) for n in per_byte)

    @property
    def widths(self) -> list[int]:
        """Of the fields that make the bits of a value, the lowest first; [8]: the value itself."""
        bits = bits_of(self.levels)
        return [w for w in (8, 4, 2, 1) if bits & w]

    def expand(self, nodes: _Nodes, shape: tuple[int, ...]) -> onnx_ir.Value:
        array = self.array.reshape(shape)
        if self.widths == [8]:
            return nodes.constant(array)
        if self.in_base:
            return self._look_up(nodes, array)
        array = array.astype(np.uint8)
        parts, shift = [], 0
        for width in self.widths:
            part = self._fields(nodes, array >> shift & 2**width - 1, width)
            up = np.array(shift, np.uint8)
            parts.append(nodes.add("BitShift", part, up, direction="LEFT") if shift else part)
            shift += width
        value = parts[0]
        for part in parts[1:]:
            value = nodes.add("BitwiseOr", value, part)
        signed = self.array.dtype == np.int8
        return nodes.add("Cast", value, to=onnx_ir.DataType.INT8) if signed else value

    def _fields(self, nodes: _Nodes, array: Array, width: int) -> onnx_ir.Value:
        """Field i of the bytes holds the i-th part of the rows."""
        per_byte = 8 // width
        packed = nodes.constant(pack_rows(array, 2**width, per_byte))
        parts = []
        for i in range(per_byte):
            part = packed
            if i:
                down = np.array(i * width, np.uint8)
                part = nodes.add("BitShift", part, down, direction="RIGHT")
            if i < per_byte - 1:
                part = nodes.add("BitwiseAnd", part, np.array(2**width - 1, np.uint8))
            parts.append(part)
        return _first_rows(nodes, nodes.add("Concat", *parts, axis=0), array.shape, per_byte)

    def _look_up(self, nodes: _Nodes, array: Array) -> onnx_ir.Value:
        """Row i of a table holds the digits i of all bytes."""
        per_byte = digits_per_byte(self.levels)
        packed = nodes.constant(pack_rows(array - self.low, self.levels, per_byte))
        places = self.levels ** np.arange(per_byte)[:, None]
        table = np.arange(self.levels**per_byte) // places % self.levels + self.low
        index = nodes.add("Cast", packed, to=onnx_ir.DataType.INT32)
        value = nodes.add("Gather", table.astype(array.dtype), index, axis=1)
        rows = np.array([-1, *array.shape[1:]], np.int64)
        value = nodes.add("Reshape", value, rows)
        return _first_rows(nodes, value, array.shape, per_byte)


@dataclass
class Sparse:
    """One bit an element, and in eight columns, one a bit of the mask's bytes, what differs.

    The first row is `rest`, the most frequent value, and the shorter columns end with it.
    """

    array: Array
    rest: Any
    mask: Array = field(init=False)  # (ceil(size / 8), 8) bool
    values: Plain | Digits = field(init=False)  # (rows, 8)

    def __post_init__(self) -> None:
        flat = np.full(-(-self.array.size // 8) * 8, self.rest, self.array.dtype)
        flat[: self.array.size] = self.array.ravel()
        columns = flat.reshape(-1, 8)
        self.mask = columns != self.rest
        values = np.full((1 + self.mask.sum(0).max(), 8), self.rest, self.array.dtype)
        for column, mask, found in zip(values.T, self.mask.T, columns.T, strict=True):
            column[1 : 1 + mask.sum()] = found[mask]
        self.values = dense(values)

    @property
    def bytes(self) -> int:
        return self.mask.size // 8 + self.values.bytes

    def expand(self, nodes: _Nodes, shape: tuple[int, ...]) -> onnx_ir.Value:
        """Counts down the columns of the mask which of the values stands where."""
        mask = nodes.constant(np.packbits(self.mask, axis=1, bitorder="little")[:, 0])
        mask = nodes.add("Cast", mask, to=onnx_ir.DataType.INT32)
        table = np.arange(256, dtype=np.int32)[:, None] >> np.arange(8, dtype=np.int32) & 1
        bits = nodes.add("Gather", table, mask, axis=0)  # (rows of the mask, 8)
        row = nodes.add("Mul", nodes.add("CumSum", bits, np.array(0)), bits)
        values = self.values.expand(nodes, self.values.array.shape)
        full = nodes.add("GatherElements", values, row, axis=0)
        if self.array.size % 8:
            full = nodes.add("Reshape", full, np.array([-1]))
            ends = (np.array([0]), np.array([self.array.size]), np.array([0]))
            full = nodes.add("Slice", full, *ends)
        return nodes.add("Reshape", full, np.array(shape, np.int64))


Form = Plain | Filled | Digits | Sparse


def smallest(array: Array) -> Form:
    """The form that takes the fewest bytes."""
    if array.size and (array == array.flat[0]).all():
        return Filled(array.ravel()[:1])
    form: Form = dense(array)
    rest = most_frequent(array)
    if rest is None or not np.count_nonzero(array == rest):
        return form
    sparse = Sparse(array, rest)
    return sparse if sparse.bytes + SPARSE_NODE_BYTES < form.bytes else form


def dense(array: Array) -> Plain | Digits:
    eight_bits = array.dtype in (np.int8, np.uint8)
    if not eight_bits or not array.size:
        return Plain(array, array.dtype == np.float32 and exact_in_half(array))
    low, top = int(array.min()), int(array.max())
    if low < 0:
        digits = Digits(array, top - low + 1, low)
        return digits if digits.in_base else Plain(array, half=False)
    return Digits(array, top + 1)


def most_frequent(array: Array) -> Any:
    """What a sparse form leaves out: zero of floats, the most frequent integer; None of others."""
    if array.dtype == np.float32:
        return 0
    if array.dtype not in (np.int8, np.uint8) or not array.size:
        return None
    low = int(array.min())
    return int(np.bincount(array.ravel().astype(np.int16) - low).argmax()) + low


def _first_rows(
    nodes: _Nodes, value: onnx_ir.Value, shape: tuple[int, ...], per_byte: int
) -> onnx_ir.Value:
    if shape[0] % per_byte == 0:
        return value
    return nodes.add("Slice", value, np.array([0]), np.array([shape[0]]), np.array([0]))


def pack_rows(array: Array, base: int, per_byte: int) -> npt.NDArray[np.uint8]:
    """uint8 (K, ...) below `base` to (ceil(K / per_byte), ...): digit i is of the i-th part."""
    rows = -(-len(array) // per_byte)
    padded = np.zeros((rows * per_byte, *array.shape[1:]), np.uint8)
    padded[: len(array)] = array
    parts = padded.reshape(per_byte, rows, *array.shape[1:])
    places = (base ** np.arange(per_byte)).astype(np.uint8)
    packed: npt.NDArray[np.uint8] = np.tensordot(places, parts, 1).astype(np.uint8)
    return packed


def bits_of(levels: int) -> int:
    """The bits of a field that holds 0 ... levels - 1."""
    return max(levels - 1, 1).bit_length()


def digits_per_byte(base: int) -> int:
    """How many digits of `base` (2 ... 256) one byte holds."""
    return max(k for k in range(1, 9) if max(base, 2) ** k <= 256)


def exact_in_half(array: Array) -> bool:
    """Whether fp16 holds every one of these float32 numbers."""
    with np.errstate(over="ignore"):
        return bool(np.array_equal(array.astype(np.float16).astype(np.float32), array))
