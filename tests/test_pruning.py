"""Unstructured and structured pruning: what goes, what stays, and that nothing else changes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from asr.network.attention import RelPositionAttention
from asr.network.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from asr.network.model import ConformerCTC, ConvModule, FeedForward
from asr.runtime.config import ModelConfig
from asr.runtime.tokenizer import ENGLISH, Tokenizer
from asr.training.data import Batch
from compress import core
from compress.core import Calibration
from compress.factorization import method as factorization
from compress.pruning import method as pruning
from compress.pruning import structured
from compress.pruning.method import Config, apply, prepare, update
from compress.quantization import method as quantization


def build(**changes):
    torch.manual_seed(0)
    config = dict(d_model=32, n_layers=2, n_heads=4, conv_kernel_size=7, subsampling_channels=16)
    model = ConformerCTC(ModelConfig(**(config | changes))).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not name.endswith("running_var"):
                tensor += 0.05 * torch.randn_like(tensor)
    return model


@pytest.fixture(params=["striding", "dw_striding"])
def model(request):
    return build(subsampling=request.param)


@pytest.fixture(scope="module")
def calibration():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([120, 90, 100])
    features = torch.randn(3, 120, 80, generator=generator)
    targets = torch.randint(1, 29, (3, 5), generator=generator)
    return Calibration([Batch(features, lengths, targets, torch.full((3,), 5), (0, 1, 2), 1.0)])


def log_probs(model, seed=1):
    x = torch.randn(2, 130, 80, generator=torch.Generator().manual_seed(seed))
    return model(x, torch.tensor([130, 80])).log_probs.detach()


def shares_of_zeros(model):
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return {
        name: float((m.weight == 0).float().mean())
        for name, m in model.named_modules()
        if type(m) in kinds
    }


def file_ratio(tmp_path, before, after):
    tokenizer = Tokenizer.characters(ENGLISH)
    for name, model in (("a.pt", before), ("b.pt", after)):
        save_checkpoint(tmp_path / name, Checkpoint(model, tokenizer))
    return (tmp_path / "a.pt").stat().st_size / (tmp_path / "b.pt").stat().st_size


# ---- unstructured ---------------------------------------------------------------------------


def test_layer_allocation_takes_the_same_share_of_every_layer(model):
    apply(model, Config(sparsity=0.3, allocation="layer"))
    for share in shares_of_zeros(model).values():
        assert share == pytest.approx(0.3, abs=0.01)


def test_global_allocation_is_the_smallest_magnitudes_of_numpy(model):
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    weights = [m.weight.detach().numpy().copy() for m in model.modules() if type(m) in kinds]
    every = np.abs(np.concatenate([w.ravel() for w in weights]))
    limit = np.sort(every)[round(0.5 * len(every)) - 1]
    apply(model, Config(sparsity=0.5))
    pruned = [m.weight.detach().numpy() for m in model.modules() if type(m) in kinds]
    for before, after in zip(weights, pruned, strict=True):
        np.testing.assert_array_equal(after, np.where(np.abs(before) <= limit, 0, before))


def test_biases_and_norms_are_not_pruned(model):
    apply(model, Config(sparsity=0.9))
    for name, tensor in model.named_parameters():
        if tensor.dim() == 1 or "bias" in name:
            assert (tensor != 0).all(), name


@pytest.mark.parametrize(("sparsity", "least"), [(0.3, 1.3), (0.5, 1.75)])
def test_the_file_holds_a_mask_and_the_survivors(tmp_path, sparsity, least):
    before, after = build(d_model=64), build(d_model=64)
    apply(after, Config(sparsity=sparsity))
    assert file_ratio(tmp_path, before, after) > least
    assert torch.equal(log_probs(after), log_probs(load_checkpoint(tmp_path / "b.pt").model))


@pytest.mark.parametrize("ratio", [1.5, 3.0])
def test_size_ratio_of_zeros(tmp_path, ratio):
    before, after = build(d_model=64), build(d_model=64)
    apply(after, Config(size_ratio=ratio))
    assert ratio - 0.03 < file_ratio(tmp_path, before, after) < 1.1 * ratio


def test_size_ratio_of_a_half_precision_file(tmp_path):
    before, after = build(d_model=64), build(d_model=64)
    for model in (before, after):
        for module in model.modules():
            core.round_own(module)
    apply(after, Config(size_ratio=1.5))
    assert 1.47 < file_ratio(tmp_path, before, after) < 1.65


def test_sparsity_zero_changes_nothing(model):
    expected = log_probs(model)
    apply(model, Config(sparsity=0.0))
    assert torch.equal(log_probs(model), expected)


def test_only_selected_layers(model):
    apply(model, Config(sparsity=0.5, include="blocks.0.*", exclude="*.depthwise"))
    for name, share in shares_of_zeros(model).items():
        inside = name.startswith("blocks.0.") and not name.endswith("depthwise")
        assert (share > 0) == inside, name


def test_gradual_pruning_is_cubic_and_only_grows(model):
    config = Config(sparsity=0.6)
    assert prepare(model, config) is model
    assert not any(shares_of_zeros(model).values())
    numbers = sum(m.weight.numel() for m in model.modules() if hasattr(m, "weight"))
    zero, shares = None, []
    for fraction in np.linspace(0, 1, 21):
        update(config, model, float(fraction))
        weights = torch.cat([w.flatten() for w in pruning.prunable(model, config)])
        if zero is not None:
            assert (weights[zero] == 0).all()
        zero = weights == 0
        shares.append(float(zero.float().mean()))
    assert numbers > 0
    for fraction, share in zip(np.linspace(0, 1, 21), shares, strict=True):
        ramp = min(fraction / pruning.RAMP, 1)
        assert share == pytest.approx(0.6 * (1 - (1 - ramp) ** 3), abs=pruning.STEP + 1e-3)
    assert shares[-1] == pytest.approx(0.6, abs=1e-3)


def test_one_shot_prunes_before_training(model):
    prepare(model, Config(sparsity=0.4, schedule="one-shot"))
    before = shares_of_zeros(model)
    assert max(before.values()) > 0.2
    update(Config(sparsity=0.4, schedule="one-shot"), model, 1.0)
    assert shares_of_zeros(model) == before


def test_pruned_and_quantized(tmp_path):
    before, after = build(d_model=64), build(d_model=64)
    apply(after, Config(sparsity=0.5))
    zeros = {n: m.weight == 0 for n, m in after.named_modules() if type(m) is nn.Linear}
    quantization.apply(after, quantization.Config(precision="int8"))
    for name, zero in zeros.items():
        assert (after.get_submodule(name).qweight[zero] == 0).all()
    assert file_ratio(tmp_path, before, after) > 4.6
    with pytest.raises(ValueError, match="already replaced"):
        apply(after, Config(sparsity=0.5))


# ---- structured -----------------------------------------------------------------------------


def zero_units(model, found, kept):
    """Sets what reads the removed units to zero: the same function in the old shape."""
    for (name, number), keep in kept.items():
        group = found[name, number]
        cut = group.cuts[-1]
        weight = model.get_submodule(name).get_parameter(cut.tensor)
        gone = torch.ones(weight.shape[cut.dim], dtype=torch.bool)
        gone[group.positions(cut, keep)] = False
        with torch.no_grad():
            weight.index_fill_(cut.dim, gone.nonzero().flatten(), 0)


@pytest.mark.parametrize("allocation", ["layer", "global"])
@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_smaller_modules_compute_what_zeroed_ones_do(model, allocation, sparsity):
    found = structured.find_groups(model, "*", "")
    scores = structured.norm_importance(model, found)
    counts = structured.count(found, scores, sparsity, allocation)
    kept = {key: scores[key].topk(n).indices.sort().values for key, n in counts.items()}
    zero_units(model, found, kept)
    expected = log_probs(model)
    before = sum(p.numel() for p in model.parameters())
    structured.prune(model, found, scores, counts, {})
    torch.testing.assert_close(log_probs(model), expected, atol=2e-5, rtol=2e-5)
    assert sum(p.numel() for p in model.parameters()) < before


def test_shares_and_multiples(model, tmp_path):
    apply(model, Config(pruning_type="structured", sparsity=0.3, allocation="layer"))
    for module in model.modules():
        if isinstance(module, FeedForward):
            assert module.args["hidden"] == module.up.out_features == 88  # 0.7 * 128 = 89.6
        if isinstance(module, RelPositionAttention):
            assert module.args["n_heads"] == module.bias_u.shape[0] == 3
            assert module.query.out_features == 24
        if isinstance(module, ConvModule):
            assert module.args["channels"] == module.depthwise.groups == 24
            assert module.up.out_features == 48
    assert model.subsampling.args["channels"] == [8, 8]  # 11.2 is nearer to 8 than to 16
    assert model.subsampling.out.in_features == 8 * 20
    save_checkpoint(tmp_path / "a.pt", Checkpoint(model, Tokenizer.characters(ENGLISH)))
    assert torch.equal(log_probs(model), log_probs(load_checkpoint(tmp_path / "a.pt").model))


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.9, 0.99])
def test_global_allocation_removes_the_share_of_each_kind(sparsity):
    model = build(n_layers=3)
    found = structured.find_groups(model, "*", "")
    generator = torch.Generator().manual_seed(0)
    scores = {k: torch.rand(g.units, generator=generator) * (i + 1)
              for i, (k, g) in enumerate(found.items())}  # fmt: skip
    counts = structured.count(found, scores, sparsity, "global")
    for kind in {g.kind for g in found.values()}:
        keys = [key for key, group in found.items() if group.kind == kind]
        units, left = sum(found[k].units for k in keys), sum(counts[k] for k in keys)
        multiple = found[keys[0]].multiple
        least = multiple * len(keys)
        assert abs(left - max((1 - sparsity) * units, least)) <= multiple
        for key in keys:
            assert counts[key] % multiple == 0
            assert counts[key] >= multiple


def test_global_allocation_spares_what_matters():
    model = build()
    found = structured.find_groups(model, "*.ff?", "")
    scores = {
        key: torch.full((g.units,), float(key[0].endswith("ff1"))) for key, g in found.items()
    }
    counts = structured.count(found, scores, 0.3, "global")
    assert {n for (name, _), n in counts.items() if name.endswith("ff1")} == {128}
    assert sum(n for (name, _), n in counts.items() if name.endswith("ff2")) == 104


def test_sparsity_zero_keeps_every_unit(model):
    expected = log_probs(model)
    apply(model, Config(pruning_type="structured", sparsity=0.0))
    assert torch.equal(log_probs(model), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "key", [("blocks.1.ff1", 0), ("blocks.0.attn", 0), ("blocks.1.conv", 0), ("subsampling", 0)]
)
def test_taylor_importance_is_the_derivative_by_a_factor_on_a_unit(calibration, key):
    """Against central differences of each utterance's CTC loss."""
    model, batch = build(), calibration.batches[0]
    found = structured.find_groups(model, "*", "")
    with torch.enable_grad():
        scores = structured.taylor_importance(model, found, calibration)
    group = found[key]
    cut = group.cuts[-1]
    weight = model.get_submodule(key[0]).get_parameter(cut.tensor)
    positions = group.positions(cut, torch.tensor([2]))
    unit = weight.index_select(cut.dim, positions)

    def losses(factor):
        weight.index_copy_(cut.dim, positions, unit * factor)
        for x, n, target in zip(
            *(batch.features, batch.feature_lengths, batch.targets), strict=True
        ):
            out = model(x[None, : int(n)]).log_probs.double().transpose(0, 1)
            frames, tokens = torch.tensor([len(out)]), torch.tensor([5])
            yield F.ctc_loss(out, target[None], frames, tokens).item()

    step = 0.02
    higher, lower = list(losses(1 + step)), list(losses(1 - step))
    slopes = (np.array(higher) - lower) / (2 * step)
    assert float(scores[key][2]) == pytest.approx((slopes**2).sum(), rel=0.05)


@torch.no_grad()
def test_refitting_lowers_the_error(calibration):
    x = calibration.batches[0].features[:1]
    expected = build()(x).log_probs
    options = {"pruning_type": "structured", "sparsity": 0.5, "allocation": "layer"}
    errors = []
    for refit in (False, True):
        model = apply(build(), Config(refit=refit, **options), calibration)
        errors.append(float((model(x).log_probs - expected).square().mean()))
    assert errors[1] < 0.4 * errors[0]


def test_without_speech_or_refitting_the_norm_alone_counts(calibration):
    options = {"pruning_type": "structured", "sparsity": 0.5, "allocation": "layer"}
    plain = apply(build(), Config(**options))
    unfitted = apply(build(), Config(refit=False, **options), calibration)
    assert torch.equal(log_probs(unfitted), log_probs(plain))
    assert not torch.equal(
        log_probs(apply(build(), Config(**options), calibration)), log_probs(plain)
    )


def test_costs_choose_better_than_norms_do(calibration):
    x = calibration.batches[0].features[:1]
    expected = build()(x).log_probs.detach()
    far = []
    for importance in ("norm", "taylor"):
        options = {"pruning_type": "structured", "sparsity": 0.4, "importance": importance}
        model = apply(build(), Config(**options, exclude="subsampling"), calibration)
        far.append(float((expected.exp() * (expected - model(x).log_probs.detach())).sum(2).mean()))
    assert far[1] < far[0]


def test_one_reader_too_wide_keeps_its_kind_from_refitting(monkeypatch):
    model = build()
    found = structured.find_groups(model, "*", "")
    assert ("subsampling", 1) in structured.refitted(model, found)
    assert ("subsampling", 0) not in structured.refitted(model, found)  # a convolution reads it
    model.blocks[0].ff1 = FeedForward(32, 64, 0.0)
    monkeypatch.setattr(structured, "LARGEST", 100)
    kinds = {key[0].split(".")[-1] for key in structured.refitted(model, found)}
    assert kinds == {"attn", "conv"}


def test_taylor_needs_speech(model, calibration):
    config = Config(pruning_type="structured", importance="taylor")
    assert config.needs_calibration
    with pytest.raises(ValueError, match="--calibration_data"):
        apply(model, config)
    apply(model, config, calibration)


@pytest.mark.parametrize("ratio", [1.3, 2.0])
def test_size_ratio_of_channels(tmp_path, ratio):
    before, after = build(d_model=64), build(d_model=64)
    apply(after, Config(pruning_type="structured", size_ratio=ratio))
    assert ratio <= file_ratio(tmp_path, before, after) < 1.1 * ratio


def test_size_ratio_out_of_reach(model):
    for kind in ("structured", "unstructured"):
        with pytest.raises(ValueError, match="out of reach"):
            apply(model, Config(pruning_type=kind, size_ratio=200.0))


def test_structured_comes_before_what_replaces_layers(model):
    factorization.apply(model, factorization.Config(rank=4, include="blocks.*"))
    with pytest.raises(ValueError, match=r"holds replaced layers \(LowRankLinear\)"):
        apply(model, Config(pruning_type="structured"))


def test_factorization_after_structured(model, tmp_path):
    apply(model, Config(pruning_type="structured", sparsity=0.3))
    factorization.apply(model, factorization.Config(rank=4, include="blocks.*"))
    save_checkpoint(tmp_path / "a.pt", Checkpoint(model, Tokenizer.characters(ENGLISH)))
    assert torch.equal(log_probs(model), log_probs(load_checkpoint(tmp_path / "a.pt").model))


def test_no_module_matches(model):
    with pytest.raises(ValueError, match=r"no module matches include 'nothing'.*subsampling"):
        apply(model, Config(pruning_type="structured", include="nothing"))


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"size_ratio": 0.5},
        {"pruning_type": "both"},
        {"allocation": "some"},
        {"importance": "l1"},
        {"schedule": "late"},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Config(**options)
