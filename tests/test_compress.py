"""Every method of the folder through the same checks; recipes, the command, and its errors."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from asr import export
from asr.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from asr.config import ModelConfig, preset
from asr.data import Batch
from asr.model import ConformerCTC
from asr.onnx_graph import stored_bytes
from asr.tokenizer import Tokenizer
from compress import cli, core, method, methods, report
from compress.core import Calibration, make_step
from tests.corpus import write_corpus

ROOT = Path(__file__).resolve().parents[1]
LOSSLESS = {  # options that hardly change the outputs
    "clustering": {"num_clusters": 256},
    "factorization": {"energy": 0.9999, "include": "*.ff1.up"},
    "pruning": {"sparsity": 0.0},
    "quantization": {"precision": "fp16"},
}
SHRINKING = {  # options, and by how much the file and the exported weights shrink at least
    "clustering": [({"num_clusters": 16}, 4.5, 4.0), ({"num_clusters": 5}, 5.5, 5.0)],
    "factorization": [({"rank": 8}, 1.2, 1.15), ({"rank": 8, "activation_aware": True}, 1.2, 1.15)],
    "pruning": [
        ({"sparsity": 0.5}, 1.7, 1.0),
        ({"pruning_type": "structured", "sparsity": 0.5}, 1.4, 1.3),
    ],
    "quantization": [
        ({"precision": "fp16"}, 1.9, 1.9),
        ({"precision": "int8"}, 3.2, 2.5),
        ({"precision": "int8", "asymmetric": True}, 3.1, 2.5),
        ({"precision": "int4"}, 4.0, 2.5),
        ({"precision": "int4", "asymmetric": True, "activation_aware": True}, 4.0, 2.5),
        ({"precision": "ternary"}, 5.0, 3.0),
    ],
}
SIZES = [  # on `small`: the bounds of the project
    ([("quantization", {"precision": "fp16"})], 1.95),
    ([("quantization", {"precision": "int8"})], 3.8),
    ([("quantization", {"precision": "int4"})], 6.5),
    ([("quantization", {"precision": "ternary"})], 12),
    ([("clustering", {"num_clusters": 256})], 3.8),
    ([("clustering", {"num_clusters": 16})], 7.2),
    ([("pruning", {"sparsity": 0.3})], 1.33),
    ([("pruning", {"sparsity": 0.5})], 1.80),
    ([("pruning", {"sparsity": 0.5}), ("quantization", {"precision": "int8"})], 5.8),
    ([("pruning", {"sparsity": 0.5}), ("clustering", {"num_clusters": 16})], 8),
]
EVERY = [
    pytest.param(name, options, id=f"{name}-{'-'.join(map(str, options.values()))}")
    for name in methods()
    for options in [o for o, *_ in SHRINKING.get(name, [({},)])]
]


def build(config, seed=0):
    """A checkpoint of random weights; norms and statistics are no round numbers."""
    torch.manual_seed(seed)
    model = ConformerCTC(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name and tensor.is_floating_point():
                tensor += 0.1 * torch.rand_like(tensor)
    return Checkpoint(model, Tokenizer.characters(), data={"train": "nowhere"})


def tiny():
    return build(
        ModelConfig(d_model=64, n_layers=1, n_heads=2, conv_kernel_size=7, subsampling_channels=32)
    )


@pytest.fixture(scope="module")
def speech():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([160, 120, 140])
    features = torch.randn(3, 160, 80, generator=generator)
    targets = torch.randint(1, 29, (3, 5), generator=generator)
    return Calibration([Batch(features, lengths, targets, torch.full((3,), 5), (0, 1, 2), 1.0)])


def outputs(checkpoint):
    x = torch.randn(2, 130, 80, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return checkpoint.model.eval()(x, torch.tensor([130, 90])).log_probs


def saved(checkpoint, path):
    save_checkpoint(path, checkpoint)
    return load_checkpoint(path), os.path.getsize(path)


def test_every_method_is_listed():
    assert set(LOSSLESS) == set(SHRINKING) == set(methods())
    for module in methods().values():
        assert issubclass(module.Config, core.Selection)
        assert all(f.metadata.get("help") for f in fields(module.Config))
        assert module.__doc__


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_outputs_are_finite_and_reload_bit_equal(name, options, speech, tmp_path):
    before = outputs(tiny())
    result = core.run(tiny(), [make_step(name, options)], speech)
    after = outputs(result)
    assert after.shape == before.shape
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)
    again, size = saved(result, tmp_path / "model.pt")
    assert torch.equal(outputs(again), after)
    assert again.history == [{"step": name, "config": result.history[0]["config"]}]
    assert result.history[0]["config"].items() >= options.items()
    resaved, resaved_size = saved(again, tmp_path / "again.pt")
    assert resaved_size == pytest.approx(size, abs=200)
    assert resaved.model.state_dict().keys() == result.model.state_dict().keys()


@pytest.mark.parametrize("name", methods())
def test_lossless_settings(name, speech):
    checkpoint = tiny()
    weight = checkpoint.model.blocks[0].ff1.up.weight.data
    weight[:, 8:] = weight[:, :8] @ torch.randn(8, 56) / 8**0.5  # for factorization: of rank 8
    before = outputs(checkpoint)
    result = core.run(checkpoint, [make_step(name, LOSSLESS.get(name, {}))], speech)
    difference = (outputs(result) - before).abs()
    assert difference.max() < 0.1
    assert difference.mean() < 0.01


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_the_file_shrinks(name, options, speech, tmp_path):
    promised = next(ratio for o, ratio, _ in SHRINKING[name] if o == options)
    checkpoint = tiny()
    _, before = saved(checkpoint, tmp_path / "before.pt")
    result = core.run(checkpoint, [make_step(name, options)], speech)
    _, after = saved(result, tmp_path / "after.pt")
    assert before / after >= promised
    assert report.file_bytes(result) == pytest.approx(after, abs=200)


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_the_exported_weights_shrink(name, options, speech):
    promised = next(ratio for o, _, ratio in SHRINKING[name] if o == options)
    result = core.run(tiny(), [make_step(name, options)], speech)
    before, after = (stored_bytes(export.prepare(c.model)) for c in (tiny(), result))
    assert before / after >= promised


def test_every_packed_layer_in_one_onnx_file(tmp_path):
    """The file computes what the checkpoint does; `to_onnx` checks its size."""
    steps = [
        make_step("factorization", {"rank": 8, "include": "*.attn.out"}),
        make_step("clustering", {"num_clusters": 5, "include": "*.ff1.up, *.depthwise"}),
        make_step("clustering", {"num_clusters": 32, "codebooks": 2, "include": "*.ff1.down"}),
        make_step("quantization", {"precision": "ternary", "include": "*.ff2.*"}),
        make_step("quantization", {"precision": "int4", "include": "*.query"}),
        make_step("quantization", {"precision": "int4", "asymmetric": True, "include": "*.key"}),
        make_step("quantization", {"asymmetric": True, "include": "head,*.value"}),
        make_step("quantization", {}),
    ]
    result = core.run(tiny(), steps)
    kinds = {type(m).__name__ for m in result.model.modules() if core.is_replaced(m)}
    assert kinds == {
        "LowRankLinear", "ClusteredLinear", "ClusteredConv", "QuantLinear", "Int8Linear",
        "QuantConv", "Int8Conv",
    }  # fmt: skip
    export.to_onnx(result, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x = torch.randn(1, 80, 130, generator=torch.Generator().manual_seed(2))
    (theirs,) = session.run(None, {"audio_signal": x.numpy(), "length": [130]})
    ours = result.model(x.transpose(1, 2)).log_probs.detach().numpy()
    assert abs(theirs - ours).mean() < 0.05


@pytest.mark.parametrize("first", methods())
@pytest.mark.parametrize("second", methods())
def test_one_method_after_another(first, second, speech, tmp_path):
    """Works and reloads, or says what is in the way."""
    steps = [make_step(name, SHRINKING[name][0][0]) for name in (first, second)]
    refused = None
    if first == "clustering":
        refused = r"already replaced .* before packing"
    elif first == second == "factorization":
        refused = "makes no layer smaller"
    if refused:
        with pytest.raises(ValueError, match=refused):
            core.run(tiny(), steps, speech)
        return
    result = core.run(tiny(), steps, speech)
    again, _ = saved(result, tmp_path / "model.pt")
    assert torch.equal(outputs(again), outputs(result))
    assert [entry["step"] for entry in again.history] == [first, second]


def test_zeros_survive_packing():
    for name in ("quantization", "clustering"):
        pruned = core.run(tiny(), [make_step("pruning", {"sparsity": 0.5})])
        zeros = {n: m.weight == 0 for n, m in core.linears(pruned.model)}
        packed = core.run(pruned, [make_step(name, {})])
        for layer, mask in zeros.items():
            assert (packed.model.get_submodule(layer).weight()[mask] == 0).all()


def test_mixed_precision_by_patterns():
    steps = [
        make_step("quantization", {"precision": "int8", "include": "*.attn.*, head"}),
        make_step("quantization", {"precision": "int4"}),
    ]
    result = core.run(tiny(), steps)
    kinds = {n: type(m).__name__ for n, m in result.model.named_modules() if core.is_replaced(m)}
    assert kinds["head"] == kinds["blocks.0.attn.query"] == "Int8Linear"
    assert kinds["blocks.0.ff1.up"] == "QuantLinear"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "model.pt"
    checkpoint = build(preset("small"))
    save_checkpoint(path, checkpoint)
    return path


@pytest.mark.parametrize(("steps", "bound"), SIZES, ids=lambda v: str(v)[:60])
def test_sizes_on_small(steps, bound, small):
    result = core.run(load_checkpoint(small), [make_step(*step) for step in steps])
    assert os.path.getsize(small) / report.file_bytes(result) >= bound


# selection and recipes


def test_linears_by_pattern():
    model = tiny().model
    names = [name for name, _ in core.linears(model, "*.ff1.*,head")]
    assert names == ["blocks.0.ff1.up", "blocks.0.ff1.down", "head"]
    assert "head" not in dict(core.linears(model, exclude="head"))
    with pytest.raises(ValueError, match=r"'\*.ff9.\*'.* 13 plain Linear layers, e.g. subsampling"):
        core.linears(model, "*.ff9.*")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("zip", {}, "unknown method 'zip'; the methods are clustering, "),
        ("clustering", {"k": 3}, "unknown option 'k' of clustering; the options are include, "),
        ("clustering", {"num_clusters": "3"}, "num_clusters of clustering must be int, not '3'"),
        ("clustering", {"num_clusters": True}, "must be int, not True"),
        ("clustering", {"fine_tune_epochs": -1}, "fine_tune_epochs -1"),
    ],
)
def test_bad_steps(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_step(name, options)


RECIPE = {"steps": [{"method": "pruning", "sparsity": 0.5}, {"method": "quantization"}]}
TOML = "[[steps]]\nmethod = 'pruning'\nsparsity = 0.5\n[[steps]]\nmethod = 'quantization'\n"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("r.json", json.dumps(RECIPE)),
        ("r.json", json.dumps(RECIPE["steps"])),
        ("r.toml", TOML),
    ],
)
def test_recipes(file, text, tmp_path):
    path = tmp_path / file
    path.write_text(text)
    steps = core.read_recipe(str(path))
    assert [step.method for step in steps] == ["pruning", "quantization"]
    assert steps[0].config == method("pruning").Config(sparsity=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON or TOML file"),
        ("[]", "expected a list of steps"),
        ('{"a": 1}', "expected a list of steps"),
        ('[{"rank": 3}]', "step 1: expected an object with a method"),
        ('[{"method": "pruning"}, {"method": "gzip"}]', "step 2: unknown method 'gzip'"),
        ('[{"method": "pruning", "rank": 3}]', "step 1: unknown option 'rank' of pruning"),
    ],
)
def test_bad_recipes(text, message, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        core.read_recipe(str(path))


# the command


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "baseline" / "model.pt"
    checkpoint = tiny()
    checkpoint.training = {"optimizer": torch.randn(100_000)}
    save_checkpoint(path, checkpoint)
    return path


def arguments(source, output, *rest):
    return ["--model_path", str(source), "--output_dir", str(output), *rest]


def test_command_writes_model_and_report(source, tmp_path, capsys):
    output = tmp_path / "out"
    flags = ("--method", "quantization", "--precision", "int8", "--exclude", "head")
    assert cli.main(arguments(source, output, *flags)) == 0
    assert sorted(p.name for p in output.iterdir()) == ["compression.json", "model.pt"]
    result = load_checkpoint(output / "model.pt")
    assert result.training is None
    assert result.data == {"train": "nowhere"}
    assert type(result.model.head) is nn.Linear
    written = json.loads((output / "compression.json").read_text())
    assert written["command"].startswith("python compress.py --model_path")
    assert written["history"] == result.history
    assert written["bytes_after"] == pytest.approx(os.path.getsize(output / "model.pt"), abs=200)
    plain = report.file_bytes(tiny())  # without the resume state
    assert written["bytes_before"] == pytest.approx(plain, abs=200)
    assert written["parameters"] == sum(p.numel() for p in tiny().model.parameters())
    rows = {row["name"]: row for row in written["layers"]}
    assert rows["head"]["kept"] == "not selected by include and exclude"
    assert rows["blocks.0.ff1.up"]["after"] == "Int8Linear"
    printed = capsys.readouterr().out
    assert "Linear -> Int8Linear" in printed
    assert "in float: head: not selected" in printed
    assert cli.main(arguments(source, output, *flags)) == 0  # its own result may be replaced


def test_recipe_and_dry_run(source, tmp_path, capsys):
    recipe = tmp_path / "r.json"
    recipe.write_text(json.dumps(RECIPE))
    output = tmp_path / "out"
    assert cli.main(arguments(source, output, "--recipe", str(recipe), "--dry_run")) == 0
    assert not output.exists()
    dry = capsys.readouterr().out
    assert re.search(r"blocks.0.ff1.up +\d", dry)
    assert cli.main(arguments(source, output, "--recipe", str(recipe))) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("file")]
    assert table[0] in dry  # the prediction is what came out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "gzip"], "invalid choice: 'gzip'"),
        (["--method", "clustering", "--num_clusters", "1"], "num_clusters 1"),
        (["--method", "clustering", "--num_clusters", "x"], "invalid int value"),
        (["--method", "clustering", "--rank", "3"], "unknown option 'rank' of clustering"),
        (["--method", "clustering", "--ranks", "3"], "--ranks"),
        (["--method", "pruning", "--sparsity", "1.5"], "sparsity 1.5"),
        (["--method", "factorization", "--rank", "9999"], "largest useful rank"),
        (["--method", "quantization", "--include", "*.ff9.*"], "'*.ff9.*'"),
        (["--method", "quantization", "--test_data", "missing"], "missing"),
        (["--method", "quantization", "--calibration_data", "missing"], "missing"),
        (["--method", "quantization", "--calibration_data", "empty"], "empty"),
        (["--method", "pruning", "--fine_tune_epochs", "1"], "nowhere"),
        (["--recipe", "missing.json"], "missing.json"),
        (["--recipe", "r.json", "--method", "pruning"], "give either --method, --recipe"),
        (["--recipe", "r.json", "--rank", "3"], "--rank goes "),
        ([], "give either --method, --recipe"),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_bad_input(flags, message, existing, source, tmp_path, capsys, monkeypatch):
    """One line, exit 2, and the folder as it was."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    output = tmp_path / "out"
    if existing:
        output.mkdir()
        (output / "note").write_text("mine")
    assert cli.main(arguments(source, output, *flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert [p.name for p in output.iterdir()] == ["note"] if existing else not output.exists()


def test_what_is_not_overwritten(source, tmp_path, capsys):
    flags = ("--method", "quantization")
    before = source.read_bytes()
    assert cli.main(arguments(source, source.parent, *flags)) == 2
    assert "is the model to compress" in capsys.readouterr().err
    other = tmp_path / "other" / "model.pt"
    save_checkpoint(other, tiny())
    assert cli.main(arguments(source, other.parent, *flags)) == 2
    assert "not made by compress.py" in capsys.readouterr().err
    assert cli.main(arguments(source, source, *flags)) == 2
    assert "not a folder" in capsys.readouterr().err
    assert cli.main(arguments(tmp_path / "none.pt", tmp_path / "out", *flags)) == 2
    assert source.read_bytes() == before


def test_command_with_speech(tmp_path, capsys):
    """Calibration on the training data that the checkpoint names; accuracy before and after."""
    corpus = write_corpus(tmp_path / "corpus")
    source, output = tmp_path / "baseline" / "model.pt", tmp_path / "out"
    checkpoint = tiny()
    checkpoint.data = {"train": str(corpus)}
    save_checkpoint(source, checkpoint)
    flags = ("--method", "quantization", "--precision", "int4", "--activation_aware")
    rest = ("--test_data", str(corpus / "dev.json"))
    assert cli.main(arguments(source, output, *flags, *rest)) == 0
    written = json.loads((output / "compression.json").read_text())
    assert written["evaluation"].keys() == {"before", "after", "paired"}
    assert written["evaluation"]["after"]["latency_p50"] > 0
    assert re.search(r"after +WER \d", capsys.readouterr().out)


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_the_script(arguments):
    done = subprocess.run(
        [sys.executable, "compress.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == (0 if arguments else 2)
    if arguments:
        assert all(
            f"--{f.name}" in done.stdout for m in methods().values() for f in fields(m.Config)
        )
