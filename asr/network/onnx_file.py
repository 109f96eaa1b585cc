"""An ONNX file written tensor by tensor: no second copy of the weights comes into memory.

protobuf's own writer builds the whole file in memory, twice. But a message is a row of fields, each
a tag, a length and contents; so the graph is written without its initializers, and these follow
one by one. Readers see an ordinary file.
"""

from __future__ import annotations

from typing import IO

import onnx
import onnx_ir

LARGEST = 2**31 - 2**24  # bytes of tensors: protobuf reads no more than 2 GB, the graph included


def write_model(program: onnx_ir.Model, file: IO[bytes]) -> None:
    """Writes a model to a binary file; its initializers are gone from it afterwards."""
    graph = program.graph
    tensors = []
    for value in graph.initializers.values():
        assert value.const_value is not None
        tensors.append((value.name, value.const_value))
    graph.initializers.clear()
    model = onnx_ir.to_proto(program)
    nodes = model.graph.SerializeToString()
    model.ClearField("graph")
    heads = [head(name, tensor) for name, tensor in tensors]
    initializer = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
    fields = [field(initializer, len(h) + tensor.nbytes)
              for h, (_, tensor) in zip(heads, tensors, strict=True)]  # fmt: skip
    length = len(nodes) + sum(map(len, fields)) + sum(map(len, heads))
    length += sum(tensor.nbytes for _, tensor in tensors)
    file.write(model.SerializeToString())
    file.write(field(onnx.ModelProto.GRAPH_FIELD_NUMBER, length) + nodes)
    for start, h, (_, tensor) in zip(fields, heads, tensors, strict=True):
        file.write(start + h)
        file.write(tensor.tobytes())


def head(name: str | None, tensor: onnx_ir.TensorProtocol) -> bytes:
    """A TensorProto up to its numbers, which are to follow as they are."""
    proto = onnx.TensorProto(name=name, data_type=tensor.dtype.value, dims=tensor.shape.numpy())
    return proto.SerializeToString() + field(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, tensor.nbytes)


def field(number: int, length: int) -> bytes:
    """What stands before a protobuf field of so many bytes."""
    return varint(number << 3 | 2) + varint(length)


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all bytes but the last have the highest bit set."""
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])
