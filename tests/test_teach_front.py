"""A phoneme recogniser's ears for our model: its file, and the teaching from end to end."""

import json
import struct

import numpy as np
import pytest
import torch

from asr.importing.hama import Teacher, read_tensors
from asr.network.checkpoint import load_checkpoint
from scripts.teach_front import main
from tests.corpus import write_corpus

D, HIDDEN, SYMBOLS = 144, 576, 191


def random_tensors():
    """Arrays with the names and shapes of the recogniser's file, weights small and random."""
    random = np.random.default_rng(0)

    def make(*shape):
        return (random.standard_normal(shape) / np.sqrt(shape[-1])).astype("f2")

    tensors = {
        "stft_real_kernel": make(201, 1, 400), "stft_imag_kernel": make(201, 1, 400),
        "mel_fb": np.abs(make(201, 80)),
        "onnx::Conv_801": make(D, 80, 3), "onnx::Conv_802": make(D),
        "acoustic_model.model.proj.weight": make(SYMBOLS, D, 1),
        "acoustic_model.model.proj.bias": make(SYMBOLS),
    }  # fmt: skip
    for n in range(4):
        start = f"acoustic_model.model.blocks.{n}."
        for norm in ("ffn1.norm", "ffn2.norm", "attn_norm", "conv.norm", "norm"):
            tensors |= {f"{start}{norm}.weight": np.ones(D, "f4"), f"{start}{norm}.bias": make(D)}
        for ffn in ("ffn1", "ffn2"):
            tensors |= {f"{start}{ffn}.fc1.bias": make(HIDDEN), f"{start}{ffn}.fc2.bias": make(D)}
        tensors |= {
            f"{start}attn.in_proj_bias": make(3 * D), f"{start}attn.out_proj.bias": make(D),
            f"{start}conv.pointwise1.weight": make(2 * D, D, 1),
            f"{start}conv.pointwise1.bias": make(2 * D),
            f"{start}conv.pointwise2.weight": make(D, D, 1),
            f"{start}conv.pointwise2.bias": make(D),
            f"onnx::Conv_{804 + 3 * n}": make(D, 1, 31), f"onnx::Conv_{805 + 3 * n}": make(D),
        }  # fmt: skip
        sizes = ((D, HIDDEN), (HIDDEN, D), (D, 3 * D), (D, D), (D, HIDDEN), (HIDDEN, D))
        for i, (rows, columns) in enumerate(sizes):
            tensors[f"onnx::MatMul_{1000 + 10 * n + i}"] = make(columns, rows).T
    return tensors


def write_hama(path, tensors):
    """The file as the wheel's: a table, then the arrays from a multiple of 16 on."""
    table, data = b"", b""
    for name, array in tensors.items():
        table += struct.pack("<H", len(name)) + name.encode()
        table += struct.pack("<BB", array.dtype == np.float16, array.ndim)
        table += struct.pack(f"<{array.ndim}I", *array.shape)
        table += struct.pack("<QQ", len(data), array.nbytes)
        data += np.ascontiguousarray(array).tobytes()
    head = b"HAMA\0\0\0\1" + struct.pack("<I", len(tensors)) + table
    path.write_bytes(head + b"\0" * (-len(head) % 16) + data)
    return path


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory):
    return write_hama(tmp_path_factory.mktemp("hama") / "asr_waveform.hama", random_tensors())


def test_the_arrays_are_read(recogniser):
    read = read_tensors(recogniser)
    for name, array in random_tensors().items():
        np.testing.assert_array_equal(read[name].numpy(), array.astype("f4"))


@pytest.mark.parametrize("size", [0, 11, 200, 5000])
def test_a_cut_file_is_named(recogniser, tmp_path, size):
    path = tmp_path / "cut.hama"
    path.write_bytes(recogniser.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"cut\.hama: not a \.hama file"):
        read_tensors(path)


def test_attention_of_a_block_is_torchs_own(recogniser):
    """Query, key and value are where they should be: PyTorch's attention gives the same."""
    teacher, tensors = Teacher(recogniser), read_tensors(recogniser)
    own = torch.nn.MultiheadAttention(D, 4, batch_first=True).eval()
    own.in_proj_weight.data = tensors["onnx::MatMul_1002"].T
    own.in_proj_bias.data = tensors["acoustic_model.model.blocks.0.attn.in_proj_bias"]
    own.out_proj.weight.data = tensors["onnx::MatMul_1003"].T
    own.out_proj.bias.data = tensors["acoustic_model.model.blocks.0.attn.out_proj.bias"]
    x = torch.randn(2, 9, D, generator=torch.Generator().manual_seed(1))
    attention = teacher.blocks[0].attn
    heard = attention.norm(x)
    expected = own(heard, heard, heard, need_weights=False)[0]
    got = attention(x, None, None)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_teaching_makes_a_model_around_the_blocks(recogniser, tmp_path):
    data = write_corpus(tmp_path / "data", per_text=1)
    out, report = tmp_path / "start.pt", tmp_path / "front.json"
    flags = ["--teacher", recogniser, "--data_dir", data, "--num_workers", 0, "--output_path", out]
    assert main([*map(str, [*flags, "--minutes", 0.03, "--report_path", report])]) == 0
    written = json.loads(report.read_text())
    assert {"command", "commit", "seed", "machine", "hours_heard"} <= written.keys()
    assert written["hours_heard"] >= 0
    assert written["at_the_end"].keys() == {"error", "divergence", "same_phoneme"}
    model = load_checkpoint(out).model
    assert (model.config.reduction_position, model.config.total_factor) == (4, 4)
    for own, other in zip(model.blocks, Teacher(recogniser).blocks, strict=False):
        moved = own.attn.query.weight - other.attn.query.weight
        assert moved.abs().max() < 0.1  # taught from there, for a second
