"""The exported file: contents, size, numbers at many shapes, and what happens if they are wrong."""

import json
import resource
from collections import Counter
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import nn

from asr.network import export, onnx_file, onnx_graph
from asr.network.checkpoint import Checkpoint, load_checkpoint
from asr.network.export import ExportError, check_parity, check_size, prepare, to_onnx
from asr.network.integers import Integers
from asr.network.onnx_layers import (
    Int8Conv2d,
    Int8Linear,
    NBitsLinear,
    pack_bits,
    rows_of_kernel,
    unpack_bits,
)
from asr.runtime.config import FeatureConfig
from asr.runtime.recognizer import load
from asr.runtime.tokenizer import Tokenizer
from tests.conftest import build_tiny_model

main = import_module("scripts.export_onnx").main
ROOT = Path(__file__).resolve().parents[1]


def random_features(frames, seed=0):
    shape = (frames, 80)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def alone(model, features):
    """log_probs (T', V) of one utterance in torch, unpadded."""
    with torch.inference_mode():
        return model(torch.from_numpy(features)[None]).log_probs[0].numpy()


def optimised_operators(path, folder):
    """What onnxruntime makes of the file, by kind of node."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(path, options)
    return Counter(n.op_type for n in onnx.load(folder / "optimised.onnx").graph.node)


# ---- the file -------------------------------------------------------------------------------


def test_one_self_contained_file_with_the_names_of_nemo(tiny_onnx):
    assert sorted(p.name for p in tiny_onnx.parent.iterdir()) == ["model.onnx", "tokens.txt"]
    model = onnx.load(tiny_onnx)
    onnx.checker.check_model(model, full_check=True)
    assert not any(t.external_data for t in model.graph.initializer)
    inputs = {i.name: i.type.tensor_type for i in model.graph.input}
    assert list(inputs) == ["audio_signal", "length"]
    assert [d.dim_value for d in inputs["audio_signal"].shape.dim] == [0, 80, 0]
    assert inputs["audio_signal"].elem_type == onnx.TensorProto.FLOAT
    assert inputs["length"].elem_type == onnx.TensorProto.INT64
    (output,) = model.graph.output
    assert output.name == "logprobs"
    assert [d.dim_value for d in output.type.tensor_type.shape.dim] == [0, 0, 29]


def test_metadata_suffice_for_a_device(tiny_onnx):
    values = {p.key: p.value for p in onnx.load(tiny_onnx).metadata_props}
    assert values["model_type"] == "EncDecCTCModel"
    assert values["normalize_type"] == "per_feature"
    assert (values["vocab_size"], values["subsampling_factor"]) == ("29", "4")
    assert json.loads(values["asr"])["tokens"] == Tokenizer.characters().tokens
    info = load(tiny_onnx).info
    assert info.features == FeatureConfig()
    assert info.parameters == sum(p.numel() for p in build_tiny_model().parameters())
    assert not info.one_at_a_time


def test_tokens_are_listed_for_other_runtimes(tiny_onnx):
    lines = tiny_onnx.with_name("tokens.txt").read_text(encoding="utf-8").splitlines()
    assert lines[:3] == ["<blk> 0", "▁ 1", "' 2"]
    assert len(lines) == 29


def test_nothing_of_this_machine_or_of_the_data_is_inside(tiny_onnx):
    contents = tiny_onnx.read_bytes()
    for secret in (str(ROOT), "site-packages", "/home/", "recordings", str(tiny_onnx.parent)):
        assert secret.encode() not in contents


def test_the_file_holds_every_weight_once(tiny_onnx):
    weights = 4 * sum(p.numel() for p in build_tiny_model().parameters())
    assert weights < tiny_onnx.stat().st_size < weights + 100_000


def test_the_graph_is_lean(tiny_onnx, tmp_path):
    operators = optimised_operators(tiny_onnx, tmp_path)
    assert operators["LayerNormalization"] + operators["SkipLayerNormalization"] == 2 * 5
    assert operators["Conv"] == 2 + 2
    assert operators["QuickGelu"] == 2 * 3  # SiLU in one node
    assert not set(operators) & {"BatchNormalization", "Sqrt", "ReduceMean", "Loop", "If"}


# ---- the numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 5, 101, 1503])
def test_log_probs_equal_those_of_torch_at_any_length(tiny_onnx, tiny_model, frames):
    features = random_features(frames)
    (found,) = load(tiny_onnx, threads=1).log_probs([features])
    np.testing.assert_allclose(found, alone(tiny_model, features), atol=1e-4)


def test_batch_mates_and_padding_change_nothing(tiny_onnx, tiny_model):
    batch = [random_features(n, seed=n) for n in (300, 8, 1, 77, 299)]
    recognizer = load(tiny_onnx, threads=1)
    for features, found in zip(batch, recognizer.log_probs(batch), strict=True):
        expected = alone(tiny_model, features)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert found.argmax(1).tolist() == expected.argmax(1).tolist()


def test_pt_and_onnx_agree(tiny_checkpoint, tiny_onnx, clip):
    pt, onnx_file = (load(path, 1, min_confidence=0) for path in (tiny_checkpoint, tiny_onnx))
    assert pt.info.parameters == onnx_file.info.parameters
    assert pt.transcribe(clip).text == onnx_file.transcribe(clip).text != ""


def test_the_lean_modules_compute_what_the_model_does(tiny_model):
    lean = prepare(tiny_model)
    features = torch.randn(3, 50, 80, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([50, 33, 7])
    with torch.inference_mode():
        found, expected = lean(features, lengths), tiny_model(features, lengths)
    assert torch.equal(found.lengths, expected.lengths)
    for i, n in enumerate(expected.lengths):
        x, y = found.log_probs[i, :n], expected.log_probs[i, :n]
        torch.testing.assert_close(x, y, atol=1e-4, rtol=0)


# ---- packed layers --------------------------------------------------------------------------


class PackedInt8(nn.Module):
    """A minimal layer with the protocol: integers, and `onnx_layer` for the export."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1) / 127
        self.register_buffer("qweight", (linear.weight / self.scale[:, None]).round().char())
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.float() * self.scale[:, None], self.bias)

    def onnx_layer(self, compute):
        return Int8Linear(Integers(self.qweight, self.scale), self.bias)


class PackedConv(PackedInt8):
    def __init__(self, conv):
        nn.Module.__init__(self)
        self.scale = conv.weight.detach().abs().flatten(1).amax(1) / 127
        integers = (conv.weight / self.scale[:, None, None, None]).round()
        self.register_buffer("qweight", integers.char())
        self.bias = conv.bias

    def forward(self, x):
        weight = self.qweight.float() * self.scale[:, None, None, None]
        return nn.functional.conv2d(x, weight, self.bias, 2, 1)

    def onnx_layer(self, compute):
        weight = Integers(rows_of_kernel(self.qweight), self.scale)
        return Int8Conv2d(weight, self.bias, (3, 3), (2, 2), (1, 1))


class PackedInt4(nn.Module):
    """Groups of 32 along the input, the last one shorter."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        padded = nn.functional.pad(weight, (0, -weight.shape[1] % 32)).unflatten(1, (-1, 32))
        self.scale = padded.abs().amax(2) / 7
        integers = (padded / self.scale[..., None]).round() + 8
        self.register_buffer("qweight", integers.flatten(1)[:, : weight.shape[1]].byte())
        self.bias = linear.bias

    def forward(self, x):
        scale = self.scale.repeat_interleave(32, 1)[:, : self.qweight.shape[1]]
        return nn.functional.linear(x, (self.qweight.float() - 8) * scale, self.bias)

    def onnx_layer(self, compute):
        return NBitsLinear(self.qweight, self.scale, self.bias, bits=4, group_size=32)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A model of three equal blocks in int8 with some int4, exported; float bytes, int bytes."""
    model = build_tiny_model(n_layers=3, d_model=48)
    float_bytes = 4 * sum(p.numel() for p in model.parameters())
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            int4 = name.endswith("ff2.down")
            model.set_submodule(name, (PackedInt4 if int4 else PackedInt8)(module))
    model.subsampling.convs[1] = PackedConv(model.subsampling.convs[1])
    path = tmp_path_factory.mktemp("packed") / "model.onnx"
    rows = to_onnx(Checkpoint(model, Tokenizer.characters()), path)
    return model, path, float_bytes, rows


def test_packed_weights_stay_integers_in_the_file(packed):
    _, path, float_bytes, _ = packed
    weights = {(t.data_type, tuple(t.dims)) for t in onnx.load(path).graph.initializer}
    assert (onnx.TensorProto.INT8, (48, 192)) in weights  # ff1.up, (K, N)
    assert (onnx.TensorProto.UINT8, (48, 6, 16)) in weights  # ff2.down: two a byte
    assert (onnx.TensorProto.INT8, (72, 8)) in weights  # the second convolution
    floats = [dims for kind, dims in weights if kind == onnx.TensorProto.FLOAT]
    assert max(np.prod(dims) for dims in floats) <= 48 * 6 * 2
    assert path.stat().st_size < float_bytes / 3.5 + 100_000  # the graph


def test_products_of_large_weights_do_not_saturate(tmp_path):
    """Pairs of uint8 times int8 overflow 16 bits on x86 without VNNI: all 127 times all 255."""
    layer = Int8Linear(Integers(torch.full((16, 64), 127, dtype=torch.int8), torch.ones(16)))
    x = torch.full((3, 64), 2.0)
    x[0, 0] = -1e-3  # so that the zero point is not 0 for all
    path = tmp_path / "layer.onnx"
    torch.onnx.export(layer.eval(), (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, layer(x), rtol=1e-6)
    assert found[1, 0] == pytest.approx(127 * 2 * 64, rel=0.01)  # 127 becomes 2 * 64


def test_packed_layers_run_in_integers(packed, tmp_path):
    _, path, _, _ = packed
    operators = optimised_operators(path, tmp_path)
    assert operators["MatMulNBits"] == 3
    # all but q, k, v, positions (which share a quantised input) and the convolution in one node
    assert operators["DynamicQuantizeMatMul"] >= 3 * 6
    integer = operators["DynamicQuantizeMatMul"] + operators["MatMulIntegerToFloat"]
    assert integer == 3 * 10 + 2 + 1
    assert operators["MatMul"] + operators["FusedMatMul"] <= 3 * 3  # of attention


def test_packed_layers_compute_what_torch_does(packed):
    model, path, _, rows = packed
    recognizer = load(path, threads=1)
    assert recognizer.one_at_a_time
    features = random_features(200)
    (found,), expected = recognizer.log_probs([features]), alone(prepare(model), features)
    assert np.mean(found.argmax(1) == expected.argmax(1)) > 0.95
    assert abs(found - expected).mean() < 0.01
    assert all(row.mean_difference < 0.06 for row in rows)  # the checkpoint has 8 bits, not 7
    parameters = sum(p.numel() for p in build_tiny_model(n_layers=3, d_model=48).parameters())
    assert recognizer.info.parameters == parameters


def test_dynamic_int8_runs_one_utterance_at_a_time(packed):
    _, path, _, _ = packed
    recognizer = load(path, threads=1)
    batch = [random_features(n, seed=n) for n in (120, 40)]
    together = recognizer.log_probs(batch)
    for features, found in zip(batch, together, strict=True):
        np.testing.assert_array_equal(found, recognizer.log_probs([features])[0])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pack_bits_round_trip(bits):
    values = torch.randint(0, 2**bits, (3, 5, 16))
    packed = pack_bits(values, bits)
    assert packed.shape == (3, 5, 2 * bits)
    assert torch.equal(unpack_bits(packed, bits), values.float())


def test_int8_convolution_is_close_to_the_float_one():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 3, 2, 1)
    packed = PackedConv(conv)
    x = torch.randn(2, 6, 21, 12)
    found = packed.onnx_layer("int8")(x)
    torch.testing.assert_close(found, packed(x), atol=0.03, rtol=0)


def test_blocks_that_differ_are_not_merged():
    first, second, third = build_tiny_model(n_layers=3).blocks
    assert onnx_graph.signature(first) == onnx_graph.signature(second)
    third.ff1.up = PackedInt8(third.ff1.up).onnx_layer("int8")
    assert onnx_graph.signature(first) != onnx_graph.signature(third)
    second.note = torch.zeros(1)
    assert onnx_graph.signature(first) != onnx_graph.signature(second)


def test_a_file_written_tensor_by_tensor_is_protobufs_own(tiny_onnx, tmp_path):
    expected = onnx.load(tiny_onnx)
    with open(tmp_path / "streamed.onnx", "wb") as file:
        onnx_file.write_model(onnx_ir.load(tiny_onnx), file)
    found = onnx.load(tmp_path / "streamed.onnx")
    assert list(found.graph.node) == list(expected.graph.node)
    tensors = {t.name: t for t in found.graph.initializer}
    assert tensors == {t.name: t for t in expected.graph.initializer}
    for model in (found, expected):
        del model.graph.initializer[:]
    assert found == expected


def test_numbers_that_export_leaves_alone_are_not_copied(tiny_model):
    before = {name: x.clone() for name, x in tiny_model.state_dict().items()}
    prepared = prepare(tiny_model)
    assert prepared.head.weight.data_ptr() == tiny_model.head.weight.data_ptr()
    assert all(torch.equal(x, before[name]) for name, x in tiny_model.state_dict().items())
    assert all(p.requires_grad for p in tiny_model.parameters())


# ---- failures -------------------------------------------------------------------------------


def test_a_model_that_no_file_holds_is_refused_before_the_work(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "LARGEST", 1000)
    monkeypatch.setattr(export, "build_graph", None)
    with pytest.raises(ExportError, match="compress it first"):
        to_onnx(quick, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_refused(tiny_onnx, tiny_model):
    with torch.no_grad():
        tiny_model.blocks[1].ff1.up.weight[3] *= 3
    with pytest.raises(ExportError, match="computes something else"):
        check_parity(tiny_model, tiny_onnx)


def test_a_file_with_unpacked_weights_is_refused(packed, tiny_onnx, tmp_path):
    model, _, float_bytes, _ = packed
    swollen = tmp_path / "swollen.onnx"
    swollen.write_bytes(bytes(3 * float_bytes))
    with pytest.raises(ExportError, match="stored twice"):
        check_size(swollen, prepare(model))


@pytest.fixture
def quick(monkeypatch, tiny_onnx, tiny_checkpoint):
    """A checkpoint whose tracing costs nothing: the graph comes from a file."""
    monkeypatch.setattr(export, "build_graph", lambda model: onnx_ir.load(tiny_onnx))
    return load_checkpoint(tiny_checkpoint)


def test_a_refused_export_leaves_the_old_file(quick, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise ExportError("no")

    monkeypatch.setattr(export, "check_parity", refuse)
    (tmp_path / "model.onnx").write_text("old")
    with pytest.raises(ExportError):
        to_onnx(quick, tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "old"


def test_a_full_disk_leaves_nothing_half_written(quick, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            to_onnx(quick, tmp_path / "model.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


# ---- the command ----------------------------------------------------------------------------


def test_the_command_prints_sizes_and_the_comparison(quick, tiny_checkpoint, tmp_path, capsys):
    path = tmp_path / "new" / "model.onnx"
    assert main(["--model_path", str(tiny_checkpoint), "--output_path", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"{path.stat().st_size:,} bytes" in out
    assert out.count("texts equal") == 4
    assert "note: " not in out


def test_tokens_of_another_model_are_not_replaced_unsaid(quick, tiny_checkpoint, tmp_path, capsys):
    flags = ["--model_path", str(tiny_checkpoint), "--output_path", str(tmp_path / "model.onnx")]
    (tmp_path / "tokens.txt").write_text("<blk> 0\nq 1\n")
    assert main(flags) == 0
    assert "tokens.txt had other tokens and was replaced" in capsys.readouterr().out
    assert main(flags) == 0
    assert "note: " not in capsys.readouterr().out


def test_integers_are_not_said_to_differ_frighteningly():
    rows = [export.Parity(2, 201, 0.37, 3e-3, True, exact) for exact in (True, False)]
    assert str(rows[0]) == "B=2 T=201: texts equal, max difference 3.7e-01, mean 3.0e-03"
    assert "3.7e-01" not in str(rows[1])
    assert "int8 rounds" in str(rows[1])


def test_the_command_names_what_is_wrong(tiny_checkpoint, tmp_path, capsys):
    flags = ["--model_path", str(tiny_checkpoint), "--output_path"]
    assert main([*flags, str(tmp_path / "model.txt")]) == 2
    assert "must end in .onnx" in capsys.readouterr().err
    assert main(["--model_path", "absent.pt", "--output_path", str(tmp_path / "a.onnx")]) == 2
    assert "absent.pt: no such file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
