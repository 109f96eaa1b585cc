"""Operations counted on the exported graph, against torch's own counter of the model that was."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from asr.measure.flops import flops_per_second, graph_flops
from asr.network import export
from asr.network.checkpoint import Checkpoint
from asr.network.model import ConformerCTC
from asr.runtime.config import ModelConfig
from asr.runtime.tokenizer import Tokenizer
from compress import core
from compress.recipes import make_step

FRAMES = 200


def build(**changes):
    torch.manual_seed(0)
    sizes = dict(d_model=32, n_layers=1, n_heads=2, conv_kernel_size=7, subsampling_channels=16)
    model = ConformerCTC(ModelConfig(**sizes | changes)).eval()
    return Checkpoint(model, Tokenizer.characters())


def by_torch(model):
    """What torch counts of the model as it is exported; without its fused attention, whose
    operations it knows not everywhere.
    """
    model = export.prepare(model)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(torch.zeros(1, FRAMES, 80))
    return counter.get_total_flops()


def exported(checkpoint, folder):
    export.to_onnx(checkpoint, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize("subsampling", ["striding", "dw_striding"])
def test_a_float_model_counts_as_torch_does(subsampling, tmp_path):
    checkpoint = build(subsampling=subsampling)
    path = exported(checkpoint, tmp_path)
    assert graph_flops(path, FRAMES) == by_torch(checkpoint.model)
    assert flops_per_second(path, 2.0) == by_torch(checkpoint.model) / 2


def test_what_runs_is_counted_not_what_is_stored(tmp_path):
    """A shared block counts at every depth, zeros and integers as ever, removed units not."""
    plain, shared = build(n_layers=2), build(n_layers=2, share_layers=1)
    whole = by_torch(plain.model)
    assert by_torch(shared.model) == whole
    assert graph_flops(exported(shared, tmp_path), FRAMES) == whole
    steps = [make_step("pruning", {"sparsity": 0.5}), make_step("quantization", {})]
    assert graph_flops(exported(core.run(plain, steps), tmp_path), FRAMES) == whole
    units = make_step("pruning", {"pruning_type": "structured", "sparsity": 0.5})
    smaller = core.run(build(n_layers=2), [units])
    counted = graph_flops(exported(smaller, tmp_path), FRAMES)
    assert counted == by_torch(smaller.model) < 0.7 * whole


def test_four_bits_count_like_any_number(tmp_path):
    checkpoint = core.run(build(), [make_step("quantization", {"precision": "int4"})])
    assert graph_flops(exported(checkpoint, tmp_path), FRAMES) == by_torch(build().model)
