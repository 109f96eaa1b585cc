"""The model against an independent NumPy implementation, and what must hold at every shape."""

import math

import numpy as np
import pytest
import scipy.signal
import scipy.special
import torch
from torch import nn

from asr.network.attention import RelPositionAttention, relative_positions, shift_relative
from asr.network.model import ConformerCTC, MaskedBatchNorm, count_parameters
from asr.network.parts import LockedDropout
from asr.network.subsampling import ConvSubsampling
from asr.runtime.config import PRESETS, ModelConfig, preset
from asr.runtime.features import subsampled_length

SMALL = dict(d_model=16, n_layers=2, n_heads=2, conv_kernel_size=7, subsampling_channels=4,
             n_mels=20, vocab_size=6, dropout=0.0)  # fmt: skip
VARIANTS = {
    "striding": {},
    "dw_striding": dict(subsampling="dw_striding"),
    "factor 8": dict(subsampling_factor=8, subsampling="dw_striding"),
    "factor 2": dict(subsampling_factor=2),
    "intermediate": dict(intermediate_layers=(1,)),
    "self-conditioned": dict(intermediate_layers=(1,), self_conditioned=True),
}


def make_model(seed: int = 0, **changes) -> ConformerCTC:
    """A small model in which every parameter and running statistic is away from its default."""
    torch.manual_seed(seed)
    model = ConformerCTC(ModelConfig(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 2 or name.endswith(("bias_u", "bias_v")):
                p.add_(0.2 * torch.randn_like(p))
        for module in model.modules():
            if isinstance(module, MaskedBatchNorm):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
    return model


def random_features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- an independent implementation: NumPy float64, one utterance, loops over positions ----------


class Reference:
    """Computes log-probabilities from a state dict, written from the papers."""

    def __init__(self, model: ConformerCTC) -> None:
        self.config = model.config
        self.state = {k: v.double().numpy() for k, v in model.state_dict().items()}

    def linear(self, name, x):
        bias = self.state.get(f"{name}.bias", 0.0)
        return np.einsum("...i,oi->...o", x, self.state[f"{name}.weight"]) + bias

    def layer_norm(self, name, x):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        x = (x - mean) / np.sqrt(var + 1e-5)
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def feed_forward(self, name, x):
        x = self.linear(f"{name}.up", self.layer_norm(f"{name}.norm", x))
        return self.linear(f"{name}.down", x * scipy.special.expit(x))

    def position(self, distance):
        d = self.config.d_model
        out = np.zeros(d)
        for i in range(0, d, 2):
            out[i] = math.sin(distance / 10000 ** (i / d))
            out[i + 1] = math.cos(distance / 10000 ** (i / d))
        return out

    def attention(self, name, x):
        x = self.layer_norm(f"{name}.norm", x)
        frames, heads = len(x), self.config.n_heads
        width = self.config.d_model // heads
        q, k, v = (self.linear(f"{name}.{n}", x) for n in ("query", "key", "value"))
        u, w = self.state[f"{name}.bias_u"][:, 0], self.state[f"{name}.bias_v"][:, 0]
        out = np.zeros_like(x)
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            scores = np.zeros((frames, frames))
            for i in range(frames):
                for j in range(frames):
                    p = self.linear(f"{name}.position", self.position(i - j))[part]
                    content = (q[i, part] + u[h]) @ k[j, part]
                    scores[i, j] = (content + (q[i, part] + w[h]) @ p) / math.sqrt(width)
            out[:, part] = scipy.special.softmax(scores, axis=1) @ v[:, part]
        return self.linear(f"{name}.out", out)

    def convolution(self, name, x):
        state = self.state
        x = self.linear(f"{name}.up", self.layer_norm(f"{name}.norm", x))
        half = x.shape[1] // 2
        x = x[:, :half] * scipy.special.expit(x[:, half:])
        kernels = state[f"{name}.depthwise.weight"][:, 0]
        x = np.stack(
            [scipy.signal.correlate(x[:, c], k, "full") for c, k in enumerate(kernels)], axis=1
        )
        side = kernels.shape[1] // 2
        x = x[side : len(x) - side] + state[f"{name}.depthwise.bias"]
        norm = f"{name}.batch_norm"
        x = (x - state[f"{norm}.running_mean"]) / np.sqrt(state[f"{norm}.running_var"] + 1e-5)
        x = x * state[f"{norm}.weight"] + state[f"{norm}.bias"]
        return self.linear(f"{name}.down", x * scipy.special.expit(x))

    def block(self, name, x):
        x = x + 0.5 * self.feed_forward(f"{name}.ff1", x)
        x = x + self.attention(f"{name}.attn", x)
        x = x + self.convolution(f"{name}.conv", x)
        x = x + 0.5 * self.feed_forward(f"{name}.ff2", x)
        return self.layer_norm(f"{name}.norm", x)

    def subsampling(self, x):
        x = x[None]  # (C, T, F)
        for stage in range(int(math.log2(self.config.subsampling_factor))):
            name = f"subsampling.convs.{stage}"
            weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
            separable = self.config.subsampling == "dw_striding" and stage > 0
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
            planes = []
            for o, kernel in enumerate(weight):
                inputs = padded[o : o + 1] if separable else padded
                plane = sum(
                    scipy.signal.correlate2d(a, k, "valid")
                    for a, k in zip(inputs, kernel, strict=True)
                )
                planes.append(plane[::2, ::2] + bias[o])
            x = np.stack(planes)
            if separable:
                pointwise = self.linear(f"subsampling.pointwise.{stage}", x.transpose(1, 2, 0))
                x = pointwise.transpose(2, 0, 1)
            x = np.maximum(x, 0)
        return self.linear("subsampling.out", x.transpose(1, 0, 2).reshape(x.shape[1], -1))

    def log_probs(self, features):
        x = self.subsampling(features.double().numpy()) * math.sqrt(self.config.d_model)
        for number in range(self.config.n_layers):
            x = self.block(f"blocks.{number}", x)
            if self.config.self_conditioned and number + 1 in self.config.intermediate_layers:
                x = x + self.linear("conditioning", scipy.special.softmax(self.head(x), axis=1))
        return scipy.special.log_softmax(self.head(x), axis=1)

    def head(self, x):
        return self.linear("head", x)


def test_a_block_equals_the_reference():
    model = make_model()
    x = random_features(1, 13, 16)
    positions = relative_positions(13, 16, x)
    with torch.inference_mode():
        found = model.blocks[1](x, positions, None, None)[0]
    expected = Reference(model).block("blocks.1", x[0].double().numpy())
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("frames", [1, 2, 9, 40])
def test_the_model_equals_the_reference(changes, frames):
    model = make_model(**changes)
    features = random_features(1, frames, 20)
    with torch.inference_mode():
        found = model(features).log_probs[0]
    np.testing.assert_allclose(found, Reference(model).log_probs(features[0]), atol=1e-4)


# ---- shapes and padding ---------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_length_gives_its_subsampled_length(changes):
    model = make_model(**changes)
    for frames in range(1, 35):
        expected = math.ceil(frames / model.config.subsampling_factor)
        with torch.inference_mode():
            output = model(random_features(2, frames, 20), torch.tensor([frames, 1]))
        assert output.log_probs.shape == (2, expected, 6)
        assert output.lengths.tolist() == [expected, 1]
        assert subsampled_length(frames, model.config.subsampling_factor) == expected
        assert torch.isfinite(output.log_probs).all()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_padding_changes_no_valid_frame(changes):
    model = make_model(**changes)
    lengths = torch.tensor([37, 50, 1, 24])
    batch = random_features(4, 61, 20) * 100  # rubbish where the padding is
    alone = []
    for i, n in enumerate(lengths.tolist()):
        batch[i, :n] /= 100
        with torch.inference_mode():
            alone.append(model(batch[i : i + 1, :n]).log_probs[0])
    with torch.inference_mode():
        output = model(batch, lengths)
    for found, expected, n in zip(output.log_probs, alone, output.lengths.tolist(), strict=True):
        assert len(expected) == n
        torch.testing.assert_close(found[:n], expected, atol=2e-5, rtol=0)


def test_padding_changes_nothing_in_training_either():
    """Losses' inputs, gradients and running statistics; dropout 0."""
    lengths = torch.tensor([30, 17])
    features = random_features(2, 30, 20)
    results = []
    for extra in (0, 13):
        model = make_model(intermediate_layers=(1,)).train()
        rubbish = random_features(2, extra, 20, seed=1) * 50
        output = model(torch.cat((features, rubbish), dim=1), lengths)
        valid = [x[i, :n] for x in (output.log_probs, *output.intermediate)
                 for i, n in enumerate(output.lengths.tolist())]  # fmt: skip
        torch.cat(valid).square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        results.append((torch.cat(valid).detach(), gradients, dict(model.named_buffers())))
    (a, a_grads, a_buffers), (b, b_grads, b_buffers) = results
    torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    for name, gradient in a_grads.items():
        torch.testing.assert_close(gradient, b_grads[name], atol=2e-3, rtol=1e-3, msg=name)
    for name, buffer in a_buffers.items():
        torch.testing.assert_close(buffer, b_buffers[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("n_mels", [20, 23, 80])
@pytest.mark.parametrize("separable", [False, True])
def test_subsampling_of_any_number_of_mels(n_mels, separable):
    layer = ConvSubsampling(n_mels, 8, [4, 6, 5], separable)
    x, lengths = layer(random_features(2, 33, n_mels), torch.tensor([33, 9]))
    assert x.shape == (2, 5, 8)
    assert lengths.tolist() == [5, 2]


# ---- presets --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("tiny", 1.0, 2.2), ("base", 5.5, 6.5), ("small", 12.5, 13.5), ("medium", 28, 32),
        ("large", 70, 74), ("fast_small", 12, 14), ("fast_medium", 25, 32),
        ("fast_large", 108, 120),
    ],
)  # fmt: skip
def test_presets_have_their_size(name, low, high):
    with torch.device("meta"):
        model = ConformerCTC(preset(name))
    assert low <= count_parameters(model) / 1e6 <= high


def test_every_preset_runs():
    for name in PRESETS:
        config = preset(name, n_layers=1, intermediate_layers=(), self_conditioned=False)
        with torch.inference_mode():
            output = ConformerCTC(config).eval()(random_features(1, 21, 80))
        frames = 3 if config.subsampling_factor == 8 else 6
        assert output.log_probs.shape == (1, frames, 29)


# ---- parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 5, 16])
@pytest.mark.parametrize("gradient", [False, True], ids=["view", "strided"])
def test_shift_relative_both_ways(frames, gradient):
    x = random_features(2, 3, frames, 2 * frames - 1).requires_grad_(gradient)
    found = shift_relative(x * 1.0)
    for i in range(frames):
        for j in range(frames):  # column of the distance i - j, where the first one is T - 1
            torch.testing.assert_close(found[:, :, i, j], x[:, :, i, frames - 1 - (i - j)])
    if gradient:
        weight = random_features(*found.shape, seed=1)
        (found * weight).sum().backward()
        expected = torch.zeros_like(x)
        for i in range(frames):
            for j in range(frames):
                expected[:, :, i, frames - 1 - (i - j)] += weight[:, :, i, j]
        torch.testing.assert_close(x.grad, expected)


def test_relative_positions_are_sinusoids_of_the_distance():
    table = relative_positions(4, 6, torch.zeros(1))
    assert table.shape == (7, 6)
    for row, distance in enumerate(range(3, -4, -1)):
        for k in range(3):
            angle = distance / 10000 ** (2 * k / 6)
            expected = [math.sin(angle), math.cos(angle)]
            assert table[row, 2 * k : 2 * k + 2].tolist() == pytest.approx(expected, abs=1e-6)


def test_attention_is_the_same_with_and_without_a_gradient():
    """Training on a CPU takes another kernel than inference."""
    torch.manual_seed(0)
    layer = RelPositionAttention(16, 2, 8)
    x = random_features(3, 11, 16)
    padding = torch.zeros(3, 1, 1, 11)
    padding[1, ..., 7:] = -math.inf
    positions = relative_positions(11, 16, x)
    trained = layer(x, positions, padding)
    with torch.inference_mode():
        found = layer(x, positions, padding)
    assert trained.requires_grad
    torch.testing.assert_close(found, trained.detach(), atol=1e-6, rtol=1e-5)


def test_attention_with_fewer_heads_than_the_width():
    layer = RelPositionAttention(16, 3, 4)  # pruned: 12 of 16
    x = random_features(2, 5, 16)
    assert layer(x, relative_positions(5, 16, x), None).shape == (2, 5, 16)


def test_masked_batch_norm_equals_batch_norm_of_the_valid_frames():
    ours, theirs = MaskedBatchNorm(6), nn.BatchNorm1d(6)
    with torch.no_grad():
        ours.weight.uniform_(0.5, 2)
        ours.bias.normal_()
    theirs.load_state_dict(ours.state_dict())
    lengths = torch.tensor([9, 4, 1])
    mask = torch.arange(9) < lengths[:, None]
    for seed in range(3):
        x = (3 * random_features(3, 9, 6, seed=seed) + 1).requires_grad_()
        gathered = x.detach()[mask].requires_grad_()
        found, expected = ours(x, mask)[mask], theirs(gathered)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        weight = random_features(*found.shape, seed=9)
        (found * weight).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(x.grad[mask], gathered.grad, atol=1e-5, rtol=1e-4)
        assert x.grad[~mask].abs().max() == 0
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    ours.eval(), theirs.eval()
    x = random_features(2, 5, 6)
    expected = theirs(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(ours(x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_batch_leaves_no_trace_in_batch_norm(bad):
    norm = MaskedBatchNorm(3)
    before = norm.running_mean.clone(), norm.running_var.clone()
    x = random_features(2, 4, 3)
    x[0, 1, 2] = bad
    norm(x)
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.running_var, before[1])


def test_locked_dropout_has_one_mask_for_all_frames():
    torch.manual_seed(0)
    layer, x = LockedDropout(0.25), torch.ones(64, 5, 100)
    y = layer.train()(x)
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert y.mean().item() == pytest.approx(1, abs=0.03)  # 6400 draws: 0.007 a standard error
    assert layer.eval()(x) is x


def test_intermediate_outputs_in_training_only():
    model = make_model(n_layers=4, intermediate_layers=(1, 3))
    features = random_features(1, 20, 20)
    assert model(features).intermediate == []
    outputs = model.train()(features).intermediate
    assert len(outputs) == 2
    for x in outputs:
        torch.testing.assert_close(x.exp().sum(2), torch.ones(1, 5))


def test_self_conditioning_feeds_the_posteriors_back():
    model = make_model(**VARIANTS["self-conditioned"])
    features = random_features(1, 20, 20)
    with torch.inference_mode():
        before = model(features).log_probs
        model.conditioning.weight.zero_(), model.conditioning.bias.zero_()
        without = model(features).log_probs
    plain = make_model(intermediate_layers=(1,))
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("conditioning")}
    plain.load_state_dict(state)
    with torch.inference_mode():
        torch.testing.assert_close(without, plain(features).log_probs)
    assert (before - without).abs().max() > 1e-3


def test_bf16_autocast_stays_close():
    model = make_model()
    features, lengths = random_features(2, 40, 20), torch.tensor([40, 21])
    with torch.inference_mode():
        expected = model(features, lengths).log_probs
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(features, lengths).log_probs
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.05  # bf16 has 8 bits of mantissa


def test_everything_that_multiplies_is_a_linear_or_a_known_convolution():
    model = make_model(**VARIANTS["dw_striding"])
    kinds = {type(m) for m in model.modules() if any(p.ndim > 1 for p in m.parameters(False))}
    assert kinds <= {nn.Linear, nn.Conv1d, nn.Conv2d, RelPositionAttention}  # biases u and v


def test_every_parameter_has_a_gradient():
    model = make_model(**VARIANTS["self-conditioned"]).train()
    output = model(random_features(2, 24, 20), torch.tensor([24, 15]))
    target = random_features(*output.log_probs.shape, seed=3)
    loss = sum((x * target).sum() for x in (output.log_probs, *output.intermediate))
    loss.backward()
    dead = {n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    # a constant added to all keys, or before a batch norm, changes nothing
    assert all(n.endswith(("key.bias", "depthwise.bias")) for n in dead)


# ---- time reduction, and blocks without positions ----------------------------------------------

REDUCED = ModelConfig(
    vocab_size=7, n_mels=12, d_model=16, n_layers=4, n_heads=2, conv_kernel_size=5,
    subsampling_factor=2, subsampling_channels=4, reduction_position=2, reduction_factor=2,
    reduction_d_model=24, plain_blocks=2, intermediate_layers=(3,), self_conditioned=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def reduced():
    torch.manual_seed(0)
    return ConformerCTC(REDUCED).eval()


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 8, 41])
def test_reduced_length_is_that_of_the_total_factor(reduced, frames):
    output = reduced(torch.randn(1, frames, 12), torch.tensor([frames]))
    assert REDUCED.total_factor == 4
    assert output.log_probs.shape == (1, math.ceil(frames / 4), 7)
    assert output.lengths.tolist() == [math.ceil(frames / 4)]


def test_padding_changes_nothing_across_the_reduction(reduced):
    features = torch.randn(3, 41, 12)
    lengths = torch.tensor([41, 30, 7])
    batch = reduced(features, lengths)
    for i, n in enumerate(lengths.tolist()):
        alone = reduced(features[i : i + 1, :n])
        torch.testing.assert_close(
            alone.log_probs[0], batch.log_probs[i, : batch.lengths[i]], atol=1e-5, rtol=1e-5
        )


def test_front_and_what_is_behind_it_are_the_whole(reduced):
    features, lengths = torch.randn(2, 41, 12), torch.tensor([41, 22])
    hidden, hidden_lengths = reduced.front(features, lengths, 2)
    assert hidden.shape == (2, 21, 16)
    behind = reduced(hidden, hidden_lengths, behind=2)
    torch.testing.assert_close(behind.log_probs, reduced(features, lengths).log_probs)


def test_reduction_is_a_linear_of_pairs(reduced):
    x = torch.randn(1, 5, 16)
    got, lengths = reduced.reduction(x, torch.tensor([5]))
    weight, bias = reduced.reduction.out.weight, reduced.reduction.out.bias
    first = weight @ torch.cat([x[0, 0], x[0, 1]]) + bias
    last = weight @ torch.cat([x[0, 4], torch.zeros(16)]) + bias
    assert lengths.tolist() == [3]
    torch.testing.assert_close(got[0, 0], first)
    torch.testing.assert_close(got[0, 2], last)


def test_plain_attention_is_that_of_torch(reduced):
    ours = reduced.blocks[0].attn
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
    parts = [ours.query, ours.key, ours.value]
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    x = torch.randn(2, 9, 16)
    y = ours.norm(x)
    expected, _ = theirs(y, y, y)
    torch.testing.assert_close(ours(x, torch.zeros(17, 16), None), expected, atol=1e-5, rtol=1e-5)


def test_plain_attention_is_relative_attention_whose_positions_weigh_nothing(reduced):
    plain = reduced.blocks[0].attn
    relative = RelPositionAttention(16, 2, 8)
    relative.load_state_dict(plain.state_dict(), strict=False)
    torch.nn.init.zeros_(relative.position.weight)
    x = torch.randn(2, 9, 16)
    positions = relative_positions(9, 16, x)
    torch.testing.assert_close(relative(x, positions, None), plain(x, positions, None))


@pytest.mark.parametrize(
    "changes",
    [
        {"reduction_position": 2},
        {"reduction_factor": 2},
        {"reduction_position": 4, "reduction_factor": 2},
        {"reduction_d_model": 24},
        {"plain_blocks": 9},
        {"reduction_position": 2, "reduction_factor": 2, "intermediate_layers": (2,)},
    ],
)
def test_reductions_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError, match=r"reduction|plain_blocks"):
        ModelConfig(**{"n_layers": 4, **changes})
