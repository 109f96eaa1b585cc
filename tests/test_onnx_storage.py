"""Tensors of a graph in few bytes: ONNX Runtime expands them to what they were, bit for bit."""

import numpy as np
import onnx_ir
import onnxruntime
import pytest

from asr.network import onnx_storage
from asr.network.onnx_storage import small_bytes, store_small

RANDOM = np.random.default_rng(0)


def graph_of(arrays):
    """A graph that returns its initializers."""
    names = [f"w{i}" for i in range(len(arrays))]
    initializers = [
        onnx_ir.Value(name=n, const_value=onnx_ir.tensor(a, name=n))
        for n, a in zip(names, arrays, strict=True)
    ]
    nodes = [onnx_ir.node("Identity", [v]) for v in initializers]
    for node, array in zip(nodes, arrays, strict=True):
        out = node.outputs[0]
        out.name = f"y_{node.inputs[0].name}"
        out.type = onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype))
        out.shape = onnx_ir.Shape(array.shape)
    graph = onnx_ir.Graph(
        [], [n.outputs[0] for n in nodes], nodes=nodes, initializers=initializers,
        opset_imports={"": 20},
    )  # fmt: skip
    return onnx_ir.Model(graph, ir_version=10)


def stored(*arrays, folder):
    """The arrays as onnxruntime gives them back, and the bytes of the graph's tensors."""
    model = graph_of(arrays)
    store_small(model)
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    onnx_ir.save(model, folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "folded.onnx")
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    assert not onnx_ir.load(folder / "folded.onnx").graph, "onnxruntime folds all of it"
    return session.run(None, {}), size


def pruned(array, share=0.5, rest=0):
    return np.where(RANDOM.random(array.shape) < share, np.array(rest, array.dtype), array)


def integers(levels, shape=(176, 80)):
    return RANDOM.integers(0, levels, shape).astype(np.uint8)


layer = RANDOM.standard_normal((352, 176)).astype(np.float32)  # as a layer is
floats = RANDOM.standard_normal((176, 80)).astype(np.float32)
halves = floats.astype(np.float16).astype(np.float32)

CASES = {  # array, bytes an element
    "float": (floats, 4),
    "half": (halves, 2),
    "large": (floats * 1e6, 4),
    "pruned": (pruned(layer), 2 + 1 / 8),
    "pruned halves": (pruned(layer.astype(np.float16).astype(np.float32)), 1 + 1 / 8),
    "int8": (integers(255), 1),
    "pruned int8": (pruned(integers(255, layer.shape), rest=128), 0.5 + 1 / 8),
    "4 bits": (integers(16), 0.5),
    "4 bits, signed": (integers(16).astype(np.int8), 0.5),
    "ternary, signed": (integers(3).astype(np.int8), 1 / 5),
    "negative": ((integers(129).astype(int) - 64).astype(np.int8), 1),
    "pruned, negative": (
        pruned((integers(129, layer.shape).astype(int) - 64).astype(np.int8)),
        0.5 + 1 / 8,
    ),
    "pruned 4 bits": (pruned(integers(16, layer.shape), rest=8), 0.25 * 15 / 16 + 1 / 8),
    "ternary": (integers(3), 1 / 5),
    "ternary around zero": ((integers(3).astype(int) - 1).astype(np.int8), 1 / 5),
    "ternary, rows that no byte ends with": (integers(3, (704, 20)), 1 / 5),
    "base 5": (integers(5), 1 / 3),
    "2 bits": (integers(4), 1 / 4),
    "1 bit": (integers(2), 1 / 8),
    "3 bits": (integers(8), 3 / 8),
    "5 bits, an odd number of rows": (integers(32, (177, 80)), 5 / 8),
    "6 bits": (integers(50), 6 / 8),
    "7 bits": (integers(128), 7 / 8),
    "pruned, no multiple of 8": (pruned(layer[:351, :175]), 2 + 1 / 8),
    "convolution": (pruned(layer).reshape(22, 16, 8, 22), 2 + 1 / 8),
    "vector": (pruned(layer).ravel(), 2 + 1 / 8),
    "all pruned": (np.zeros_like(floats), 4 / floats.size),
    "all equal": (np.full(floats.shape, -7, np.int8), 1 / floats.size),
}


@pytest.mark.parametrize(("array", "share"), CASES.values(), ids=CASES)
def test_every_form_comes_back_and_is_small(array, share, tmp_path):
    (found,), size = stored(array, folder=tmp_path)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    assert small_bytes(array) == pytest.approx(share * array.size, rel=0.04)
    assert size < small_bytes(array) + 20000  # tables and shapes


def test_equal_constants_are_there_once(tmp_path):
    arrays = [integers(3) for _ in range(20)]
    found, size = stored(*arrays, folder=tmp_path)
    for x, y in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(x, y)
    assert size < 20 * small_bytes(arrays[0]) + 3000


def test_what_does_not_shrink_is_left_alone():
    model = graph_of([floats, integers(256), floats[:5, :3], np.arange(999)])
    before = [n.op_type for n in model.graph]
    store_small(model)
    assert [n.op_type for n in model.graph] == before


def test_rows_are_packed_from_the_lowest_digit():
    packed = onnx_storage.pack_rows(np.array([[1], [2], [0], [2]], np.uint8), 3, 2)
    assert packed.tolist() == [[1 + 3 * 0], [2 + 3 * 2]]
