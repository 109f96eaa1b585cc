"""Models out of NeMo's `.onnx` exports.

export.onnx was written by torch's exporter from NeMo 3.0.0's own network code with random weights
(experiments/importing/nemo_wheel.py); export.npz has features and the log-probabilities.
"""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from asr.importing.archive import ArchiveError
from asr.importing.onnx_file import import_onnx
from asr.runtime.recognizer import load
from scripts import import_model

DATA = Path(__file__).parent / "data" / "nemo"
TOKENS = [*"▁abcdefghijklmnopqrs", "<blk>"]
ORDER = [20, *range(1, 20), 0]  # of NeMo's columns


def place(folder: Path, model: onnx.ModelProto | None = None, name: str = "tokens.txt") -> Path:
    """The export, or what became of it, with its tokens beside it."""
    path = folder / "model.onnx"
    if model is None:
        path.write_bytes((DATA / "export.onnx").read_bytes())
    else:
        onnx.save(model, path)
    text = "".join(f"{token} {i}\n" for i, token in enumerate(TOKENS))
    (folder / name).write_text(text, encoding="utf-8")
    return path


def largest_difference(path: Path) -> float:
    numbers = np.load(DATA / "export.npz")
    model = import_onnx(path).checkpoint.model
    with torch.inference_mode():
        found = model(torch.from_numpy(numbers["features"].T.copy())[None]).log_probs[0].numpy()
    return float(abs(found - numbers["log_probs"][:, ORDER]).max())


@pytest.mark.parametrize("name", ["tokens.txt", "vocab.txt"])
def test_float_export_is_met_exactly(tmp_path, name):
    path = place(tmp_path, name=name)
    assert largest_difference(path) < 1e-5
    assert import_onnx(path).checkpoint.tokenizer.tokens == ["<blk>", *TOKENS[1:20], "▁"]


def test_half_precision_and_int8_exports(tmp_path):
    from onnxruntime.quantization import quantize_dynamic

    half = onnx.load(DATA / "export.onnx")
    for x in half.graph.initializer:
        if x.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(x).astype(np.float16)
            x.CopyFrom(onnx.numpy_helper.from_array(values, x.name))
    assert 0 < largest_difference(place(tmp_path, half)) < 0.02
    quantize_dynamic(str(DATA / "export.onnx"), str(tmp_path / "model.onnx"))
    assert 0 < largest_difference(tmp_path / "model.onnx") < 0.1
    assert "stays lost" in import_onnx(tmp_path / "model.onnx").notes[0]


def test_the_same_file_runs_without_an_import(tmp_path):
    path = place(tmp_path)
    numbers = np.load(DATA / "export.npz")
    recognizer = load(path, threads=1)
    assert recognizer.info.subsampling_factor == 8
    (found,) = recognizer.log_probs([numbers["features"].T.copy()])
    np.testing.assert_allclose(found, numbers["log_probs"][:, ORDER], atol=1e-4)


def test_nodes_without_names_are_refused_with_the_reason(tmp_path):
    model = onnx.load(DATA / "export.onnx")
    for i, node in enumerate(model.graph.node):
        node.name = f"n{i}"
    with pytest.raises(ArchiveError, match="optimiser"):
        import_onnx(place(tmp_path, model))


def test_damaged_files_and_missing_tokens_are_one_line(tmp_path, capsys):
    data = (DATA / "export.onnx").read_bytes()
    output = tmp_path / "model.pt"
    for name, contents, word in (
        ("cut", data[: len(data) // 2], "not a usable"), ("text", b"hello", "not a usable"),
        ("empty", b"", "audio_signal"), ("alone", data, "tokens.txt"),
    ):  # fmt: skip
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(contents)
        argv = ["--model_path", str(path), "--output_path", str(output)]
        assert import_model.main(argv) == 2, name
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert word in error or name == "empty", error
    assert not output.exists()


def test_the_command_takes_an_export(tmp_path, capsys):
    output = tmp_path / "out.pt"
    argv = ["--model_path", str(place(tmp_path)), "--output_path", str(output)]
    assert import_model.main(argv) == 0, capsys.readouterr().err
    assert output.exists()
