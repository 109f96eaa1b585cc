"""Shared blocks: stored once, run at every depth, in .pt, in .onnx and under every method."""

import os

import onnxruntime
import pytest
import torch

from asr.network import export
from asr.network.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from asr.network.model import ConformerCTC, count_parameters
from asr.network.onnx_graph import stored_bytes
from asr.network.parts import Turns
from asr.runtime.config import ModelConfig
from asr.runtime.tokenizer import Tokenizer
from asr.training.data import Batch
from compress import core
from compress.calibration import input_moments, output_gradients
from compress.core import Calibration
from compress.recipes import make_step

DIMENSIONS = dict(d_model=32, n_heads=2, conv_kernel_size=7, subsampling_channels=16)


def build(**changes):
    """Random weights; every norm and every statistic is another."""
    torch.manual_seed(0)
    config = ModelConfig(**DIMENSIONS | {"n_layers": 4, "share_layers": 1} | changes)
    model = ConformerCTC(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name and tensor.is_floating_point():
                tensor += 0.3 * torch.rand_like(tensor)
    return Checkpoint(model, Tokenizer.characters(), data={"train": "nowhere"})


def log_probs(model, frames=90):
    x = torch.randn(2, frames, 80, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(x, torch.tensor([frames, frames - 25])).log_probs


@pytest.fixture(scope="module")
def speech():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 160, 80, generator=generator)
    targets = torch.randint(1, 29, (3, 5), generator=generator)
    lengths = torch.tensor([160, 120, 140])
    return Calibration([Batch(features, lengths, targets, torch.full((3,), 5), (0, 1, 2), 1.0)])


def unshared(checkpoint):
    """The model whose blocks are copies of the shared ones, each with the norms of its depth."""
    shared = checkpoint.model
    values = {
        f: getattr(shared.config, f) for f in shared.config.__dataclass_fields__
    } | {"share_layers": 0, "own_norms": False}  # fmt: skip
    model = ConformerCTC(ModelConfig(**values)).eval()
    state = {k: v for k, v in shared.state_dict().items() if not k.startswith("blocks")}
    for depth, (block, turn) in enumerate(shared.depths()):
        turns = [name for name, m in block.named_modules() if isinstance(m, Turns)]
        for key, value in block.state_dict().items():
            norm = next((name for name in turns if key.startswith(f"{name}.")), None)
            if norm is not None:
                number, _, rest = key.removeprefix(f"{norm}.").partition(".")
                if int(number) != turn:
                    continue
                key = f"{norm}.{rest}"
            state[f"blocks.{depth}.{key}"] = value
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("own_norms", [False, True])
@pytest.mark.parametrize("share_layers", [1, 3, 4])
def test_a_shared_model_computes_what_its_unrolled_twin_does(share_layers, own_norms):
    checkpoint = build(share_layers=share_layers, own_norms=own_norms)
    assert len(checkpoint.model.blocks) == share_layers
    assert torch.equal(log_probs(checkpoint.model), log_probs(unshared(checkpoint)))


def test_gradients_are_those_of_the_unrolled_twin_summed_over_depths():
    checkpoint = build(dropout=0.0)
    twin = unshared(checkpoint)
    x = torch.randn(1, 90, 80)
    for model in (checkpoint.model, twin):
        model(x).log_probs[..., 3].sum().backward()
    ours = checkpoint.model.blocks[0].ff1.up.weight.grad
    theirs = sum(block.ff1.up.weight.grad for block in twin.blocks)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_statistics_are_of_each_depth():
    model = build().model.train()
    model(torch.randn(2, 200, 80))
    means = [norm.running_mean for norm in model.blocks[0].conv.batch_norm]
    assert all(not torch.allclose(means[0], other, atol=1e-4) for other in means[1:])


def test_files_hold_a_shared_block_once(tmp_path):
    sizes, needed = {}, {}
    for share in (0, 1):
        checkpoint = build(d_model=64, n_layers=6, share_layers=share, own_norms=share > 0)
        save_checkpoint(tmp_path / "model.pt", checkpoint)
        again = load_checkpoint(tmp_path / "model.pt")
        assert torch.equal(log_probs(again.model), log_probs(checkpoint.model))
        assert again.model.config == checkpoint.model.config
        sizes[share] = os.path.getsize(tmp_path / "model.pt")
        needed[share] = stored_bytes(export.prepare(again.model))
    assert sizes[0] > 3 * sizes[1]
    assert needed[0] > 3 * needed[1]
    export.to_onnx(again, tmp_path / "model.onnx")  # fails where a weight is stored twice
    assert os.path.getsize(tmp_path / "model.onnx") < needed[0] / 2


METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "int8": ("quantization", {}),
    "int4": ("quantization", {"precision": "int4", "activation_aware": True}),
    "int2": ("quantization", {"precision": "int2"}),
    "ternary": ("quantization", {"precision": "ternary"}),
    "fp16": ("quantization", {"precision": "fp16"}),
    "zeros": ("pruning", {"sparsity": 0.5, "importance": "taylor"}),
    "units": ("pruning", {"pruning_type": "structured", "sparsity": 0.4}),
    "units by speech": (
        "pruning", {"pruning_type": "structured", "sparsity": 0.4, "importance": "taylor"},
    ),
    "low rank": ("factorization", {"rank": 6, "activation_aware": True}),
    "clusters": ("clustering", {"num_clusters": 16}),
}  # fmt: skip


@pytest.mark.parametrize("own_norms", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_works_on_a_shared_model(name, own_norms, speech, tmp_path):
    checkpoint = core.run(build(own_norms=own_norms), [make_step(*METHODS[name])], speech)
    assert len(checkpoint.model.blocks) == 1
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    again = load_checkpoint(tmp_path / "model.pt")
    ours = log_probs(checkpoint.model)
    assert torch.isfinite(ours).all()
    assert torch.equal(log_probs(again.model), ours)


@pytest.mark.parametrize(
    ("last", "compute", "bound"),
    [("int8", "int8", 0.05), ("clusters", "int8", 0.05), ("clusters", "float", 1e-4)],
)
def test_compressed_shared_models_export(last, compute, bound, speech, tmp_path):
    """Fewer units, then low rank and 4 bits in places, then the rest."""
    steps = [
        make_step(*METHODS["units"]),
        make_step("factorization", {"rank": 6, "include": "*.attn.out"}),
        make_step("quantization", {"precision": "int4", "include": "*.ff1.*"}),
        make_step(METHODS[last][0], METHODS[last][1] | {"exclude": "*.ff1.*"}),
    ]
    checkpoint = core.run(build(own_norms=True, n_layers=3), steps, speech)
    export.to_onnx(checkpoint, tmp_path / "model.onnx", compute=compute)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x = torch.randn(1, 80, 130, generator=torch.Generator().manual_seed(2))
    (theirs,) = session.run(None, {"audio_signal": x.numpy(), "length": [130]})
    with torch.inference_mode():
        ours = checkpoint.model(x.transpose(1, 2)).log_probs.numpy()
    assert abs(theirs - ours).mean() < bound


def test_calibration_counts_every_turn(speech):
    """Moments and gradients of a shared layer are those of its depths together."""
    checkpoint = build()
    name, twins = "blocks.0.ff1.down", [f"blocks.{i}.ff1.down" for i in range(4)]
    twin = unshared(checkpoint)
    ours = input_moments(checkpoint.model, speech, [name])[name]
    theirs = input_moments(twin, speech, twins)
    mean = torch.stack([theirs[n].gram for n in twins]).mean(0)
    assert torch.allclose(ours.gram, mean, rtol=1e-3, atol=1e-5)
    gradients = output_gradients(checkpoint.model, speech, [name])[name]
    others = output_gradients(twin, speech, twins)
    total = torch.stack([others[n] for n in twins]).sum(0)
    assert torch.allclose(gradients, total, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share_layers": 5}, "share_layers 5 must lie in 0..n_layers"),
        ({"share_layers": -1}, "share_layers -1"),
        ({"share_layers": 0, "own_norms": True}, "own_norms is for shared blocks"),
    ],
)
def test_impossible_sharing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(n_layers=4, **changes)


def test_parameters_are_counted_once():
    shared, plain = build().model, build(share_layers=0).model
    block = count_parameters(plain.blocks[0])
    norms = shared.blocks[0].conv.batch_norm[1:]
    extra = sum(p.numel() for norm in norms for p in norm.parameters())
    assert count_parameters(plain) - count_parameters(shared) == 3 * block - extra
