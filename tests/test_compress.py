"""Every method of the folder through the same checks; recipes, and reasons in the report."""

import json
import os
import re
from dataclasses import fields

import onnxruntime
import pytest
import torch

from asr.network import export
from asr.network.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from asr.network.model import ConformerCTC
from asr.network.onnx_graph import stored_bytes
from asr.runtime.config import ModelConfig, preset
from asr.runtime.tokenizer import Tokenizer
from asr.training.data import Batch
from compress import core, method, methods, recipes, report
from compress.core import Calibration
from compress.recipes import make_step

LOSSLESS = {  # options that hardly change the outputs
    "clustering": {"num_clusters": 256},
    "distillation": {"fine_tune_epochs": 0},
    "factorization": {"energy": 0.9999, "include": "*.ff1.up"},
    "pruning": {"sparsity": 0.0},
    "quantization": {"precision": "fp16"},
    "recovery": {"fine_tune_epochs": 0},
}
SHRINKING = {  # options, and by how much the file and the exported weights shrink at least
    "clustering": [({"num_clusters": 16}, 4.5, 4.0), ({"num_clusters": 5}, 5.5, 5.0)],
    "distillation": [
        ({"d_model": 32, "fine_tune_epochs": 0}, 2.0, 2.0),
        ({"ff_expansion": 2, "fine_tune_epochs": 0}, 1.2, 1.2),
    ],
    "factorization": [({"rank": 8}, 1.2, 1.15), ({"rank": 8, "activation_aware": True}, 1.2, 1.15)],
    "pruning": [
        ({"sparsity": 0.5}, 1.7, 1.6),
        ({"pruning_type": "structured", "sparsity": 0.5}, 1.4, 1.3),
    ],
    "quantization": [
        ({"precision": "fp16"}, 1.9, 1.9),
        ({"precision": "int8"}, 3.2, 2.5),
        ({"precision": "int8", "asymmetric": True}, 3.1, 2.5),
        ({"precision": "int4"}, 4.0, 2.5),
        ({"precision": "int4", "asymmetric": True, "activation_aware": True}, 4.0, 2.5),
        ({"precision": "int2"}, 4.6, 2.8),
        ({"precision": "int2", "activation_aware": True}, 4.6, 2.8),
        ({"precision": "ternary"}, 5.0, 3.0),
    ],
}
TRAINING = ("recovery",)  # changes nothing but by training
SIZES = [  # on `small`: the bounds of the project
    ([("quantization", {"precision": "fp16"})], 1.95),
    ([("quantization", {"precision": "int8"})], 3.8),
    ([("quantization", {"precision": "int4"})], 6.5),
    ([("quantization", {"precision": "int2"})], 10),
    ([("quantization", {"precision": "ternary"})], 12),
    ([("clustering", {"num_clusters": 256})], 3.8),
    ([("clustering", {"num_clusters": 16})], 7.2),
    ([("pruning", {"sparsity": 0.3})], 1.33),
    ([("pruning", {"sparsity": 0.5})], 1.80),
    ([("pruning", {"pruning_type": "structured", "sparsity": 0.3})], 1.35),
    ([("factorization", {"size_ratio": 2.2})], 2.2),
    ([("pruning", {"sparsity": 0.5}), ("quantization", {"precision": "int8"})], 5.8),
    ([("pruning", {"sparsity": 0.5}), ("clustering", {"num_clusters": 16})], 8),
]
EVERY = [
    pytest.param(name, options, id=f"{name}-{'-'.join(map(str, options.values()))}")
    for name in methods()
    if name not in TRAINING
    for options in [o for o, *_ in SHRINKING[name]]
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
    assert set(LOSSLESS) == set(SHRINKING) | set(TRAINING) == set(methods())
    for module in methods().values():
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
    own = {k: v for k, v in options.items() if k != "fine_tune_epochs"}
    assert result.history[0]["config"].items() >= own.items()
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
    assert after < 1.05 * report.file_bytes(result) + 5_000


def onnx_difference(checkpoint, folder, compute):
    """Mean difference of the log-probabilities of both files; `to_onnx` checks its own size."""
    again, _ = saved(checkpoint, folder / "model.pt")
    export.to_onnx(again, folder / "model.onnx", compute)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    x = torch.randn(1, 80, 130, generator=torch.Generator().manual_seed(2))
    (theirs,) = session.run(None, {"audio_signal": x.numpy(), "length": [130]})
    prepared = export.prepare(again.model, compute)  # the same integers
    ours = prepared(x.transpose(1, 2)).log_probs.detach().numpy()
    return abs(theirs - ours).mean()


def replaced(model):
    return {type(m).__name__ for m in model.modules() if core.is_replaced(m)}


def test_every_packed_layer_in_one_onnx_file(tmp_path):
    steps = [
        make_step("factorization", {"rank": 8, "include": "*.attn.out"}),
        make_step("clustering", {"num_clusters": 5, "include": "*.ff1.up, *.depthwise"}),
        make_step("clustering", {"num_clusters": 32, "codebooks": 2, "include": "*.ff1.down"}),
        make_step("quantization", {"precision": "ternary", "include": "*.ff2.*"}),
        make_step("quantization", {"precision": "int4", "include": "*.query"}),
        make_step("quantization", {"precision": "int4", "asymmetric": True, "include": "*.key"}),
        make_step("quantization", {"precision": "int2", "include": "*.conv.up"}),
        make_step("quantization", {"asymmetric": True, "include": "head,*.value"}),
        make_step("quantization", {}),
    ]
    result = core.run(tiny(), steps)
    assert replaced(result.model) == {
        "LowRankLinear", "ClusteredLinear", "ClusteredConv", "QuantLinear", "Int8Linear",
        "QuantConv", "Int8Conv",
    }  # fmt: skip
    assert onnx_difference(result, tmp_path, "int8") < 0.02


def test_what_computes_in_float_is_equal_in_onnx(tmp_path):
    """Every method again, but for int8, which rounds activations."""
    steps = [
        make_step("pruning", {"pruning_type": "structured", "sparsity": 0.5}),
        make_step("pruning", {"sparsity": 0.5}),
        make_step("factorization", {"rank": 8, "include": "*.ff1.up"}),
        make_step("clustering", {"num_clusters": 16, "include": "*.ff1.up.*,subsampling.*"}),
        make_step("quantization", {"precision": "ternary", "include": "*.ff2.*"}),
        make_step("quantization", {"precision": "int4", "include": "*.query"}),
        make_step("quantization", {"precision": "int2", "include": "*.key"}),
        make_step("quantization", {"precision": "fp16"}),
    ]
    result = core.run(tiny(), steps)
    assert replaced(result.model) >= {"LowRankLinear", "ClusteredConv", "QuantLinear"}
    assert onnx_difference(result, tmp_path, "float") < 1e-5


PACKINGS = ("int8", "int4", "int2", "ternary")
CHAIN = {  # what is crossed with what
    "clustering": ("clustering", {}),
    "factorization": ("factorization", {"rank": 8}),
    "unstructured": ("pruning", {"sparsity": 0.5}),
    "structured": ("pruning", {"pruning_type": "structured", "sparsity": 0.5}),
    **{name: ("quantization", {"precision": name}) for name in ("fp16", *PACKINGS)},
}
PACKED = ("clustering", *PACKINGS)


@pytest.mark.parametrize("first", CHAIN)
@pytest.mark.parametrize("second", CHAIN)
def test_one_method_after_another(first, second, speech, tmp_path):
    """Works and reloads, or says what is in the way."""
    steps = [make_step(*CHAIN[name]) for name in (first, second)]
    refused = None
    if second == "structured" and first in (*PACKED, "factorization"):
        refused = "structured pruning comes before"
    elif first in PACKED:
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
    assert [entry["step"] for entry in again.history] == [step.method for step in steps]


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
    steps = recipes.read_recipe(str(path))
    assert [step.method for step in steps] == ["pruning", "quantization"]
    assert steps[0].config == method("pruning").Config(sparsity=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON or TOML file"),
        ("[]", "expected a list of steps"),
        ('{"a": 1}', "expected a list of steps"),
        (
            '{"method": "pruning", "steps": [{"method": "pruning"}]}',
            "unknown key 'method'.*'steps'",
        ),
        ('[{"method": "pruning", "sparsity": NaN}]', "step 1: .* finite number, not nan"),
        (
            '[{"method": "pruning", "distill_weight": 0}]',
            "step 1: distill_weight .* give fine_tune_epochs",
        ),
        ('[{"rank": 3}]', "step 1: expected an object with a method"),
        ('[{"method": "pruning"}, {"method": "gzip"}]', "step 2: unknown method 'gzip'"),
        ('[{"method": "pruning", "rank": 3}]', "step 1: unknown option 'rank' of pruning"),
    ],
)
def test_bad_recipes(text, message, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        recipes.read_recipe(str(path))


# what the table says of layers that stay


def reasons(steps):
    checkpoint = tiny()
    before = report.layer_sizes(checkpoint.model)
    result = core.run(checkpoint, steps)
    return {row.name: row.kept for row in report.compare(before, result.model, steps)}


def test_why_structured_pruning_left_a_layer():
    """Of two heads none goes at 10 %; the head is in no module that it prunes."""
    options = {"pruning_type": "structured", "sparsity": 0.1, "allocation": "layer"}
    kept = reasons([make_step("pruning", options)])
    assert kept["blocks.0.attn.query"] == "lost no units"
    assert kept["head"] == "not a layer that structured pruning changes"
    assert kept["blocks.0.ff1.up"] == ""
    kept = reasons([make_step("pruning", {**options, "include": "*.attn"})])
    assert kept["blocks.0.attn.query"] == "lost no units"
    assert kept["blocks.0.ff1.up"] == "not selected by include and exclude"


def test_why_unstructured_pruning_left_a_layer():
    checkpoint = tiny()
    checkpoint.model.head.weight.data *= 100
    before = report.layer_sizes(checkpoint.model)
    steps = [make_step("pruning", {"sparsity": 0.3})]
    rows = report.compare(before, core.run(checkpoint, steps).model, steps)
    kept = {row.name: row.kept for row in rows}
    assert kept["head"] == "too few of its weights were small enough"
    assert kept["blocks.0.ff1.up"] == ""


def test_why_several_steps_left_a_layer():
    steps = [make_step("pruning", {"sparsity": 0.0}), make_step("factorization", {"rank": 25})]
    kept = reasons(steps)
    assert kept["subsampling.convs.1"] == (
        "too few of its weights were small enough and not a layer that factorization changes"
    )
    assert kept["head"].startswith("smaller only below rank")
    checkpoint = core.run(tiny(), [make_step("quantization", {"precision": "fp16"})])
    before = report.layer_sizes(checkpoint.model)
    steps = [make_step("quantization", {"precision": "fp16"})]
    rows = report.compare(before, core.run(checkpoint, steps).model, steps)
    assert {row.kept for row in rows if row.before == "Linear"} == {"was in half precision before"}


def test_the_summary_of_layers_that_go_or_come():
    """A shared student stores fewer blocks; what is in one model alone has no ratio."""
    checkpoint = build(ModelConfig(d_model=16, n_layers=2, n_heads=2, subsampling_channels=8))
    before = report.layer_sizes(checkpoint.model)
    steps = [make_step("distillation", {"share_layers": 1, "own_norms": True,
                                        "fine_tune_epochs": 0})]  # fmt: skip
    rows = report.compare(before, core.run(checkpoint, steps).model, steps)
    table = report.summary_table(rows, 2000, 1000).splitlines()
    ratios = {re.split(r"\s{2,}", line)[0]: line.split()[-1] for line in table[1:]}
    assert ratios["Linear -> removed"] == ratios["added -> LayerNorm"] == "–"
    assert ratios["file"] == "2.00"
