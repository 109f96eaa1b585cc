"""Fine-tuning: zeros stay, it resumes to the bit, it learns from the teacher, it needs data."""

import copy
import json
import os
import signal

import pytest
import torch
from torch import nn

from asr.network.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from asr.network.model import ConformerCTC
from asr.runtime.config import ModelConfig
from asr.runtime.tokenizer import Tokenizer
from asr.training.data import BatchDataset
from asr.training.loss import ctc_loss
from compress import calibration, core, finetuning, imitation, recipes, registry
from compress.finetuning import Options
from compress.pruning import method as pruning
from compress.pruning import structured
from experiments import held_out
from tests.corpus import write_corpus

TRAINED = {
    "epochs": 3, "batch_size": 4, "learning_rate": 0.004, "num_workers": 0, "warmup_steps": 5,
    "specaugment_start": 0.5, "precision": "float32", "seed": 3, "no_longer_known": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def checkpoint(corpus):
    torch.manual_seed(0)
    model = ConformerCTC(
        ModelConfig(
            vocab_size=5, d_model=16, n_layers=2, n_heads=2, conv_kernel_size=7,
            subsampling_channels=8, dropout=0.0,
        )
    ).eval()  # fmt: skip
    history = [{"step": "train", "config": TRAINED, "epoch": 3, "dev_wer": 0.5}]
    return Checkpoint(
        model, Tokenizer.characters("abc"), data={"train": str(corpus)}, history=history
    )


def steps(method="pruning", **options):
    return [recipes.make_step(method, {"fine_tune_epochs": 2, **options})]


def zeros(model):
    weights = finetuning.matrices(model)
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("schedule", ["gradual", "one-shot"])
def test_zeros_stay_and_the_rest_moves(checkpoint, schedule):
    before = copy.deepcopy(checkpoint.model)
    result = core.run(checkpoint, steps(sparsity=0.5, schedule=schedule))
    weights = pruning.prunable(result.model, pruning.Config())
    share = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert share == pytest.approx(0.5, abs=0.002)
    old, new = before.blocks[0].ff1.up.weight, result.model.blocks[0].ff1.up.weight
    assert not torch.equal(old[new != 0], new[new != 0])
    assert not result.model.training
    assert all(p.requires_grad for p in result.model.parameters())


def test_zeros_of_an_earlier_step_stay(checkpoint):
    pruned = core.run(checkpoint, [recipes.make_step("pruning", {"sparsity": 0.4})])
    zero = {n: m.weight == 0 for n, m in pruned.model.named_modules() if type(m) is nn.Linear}
    result = core.run(pruned, steps("quantization", precision="int4"))
    for name, mask in zero.items():
        assert (result.model.get_submodule(name).qweight[mask] == 0).all()
    assert [entry["step"] for entry in result.history] == ["train", "pruning", "quantization"]
    assert result.history[-1]["config"]["fine_tune_epochs"] == 2


@pytest.mark.parametrize(
    ("method", "options"),
    [("quantization", {"precision": "fp16"}), ("pruning", {}), ("factorization", {"rank": 4})],
)
def test_a_half_precision_file_stays_one(checkpoint, method, options):
    """Fine-tuning what ships as fp16 must not double its file."""
    plain = core.run(copy.deepcopy(checkpoint), steps(method, **options))
    assert core.is_half(plain.model) == (method == "quantization")
    for tensor in checkpoint.model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(core.round_to_half(tensor))
    assert core.is_half(core.run(checkpoint, steps(method, **options)).model)


def test_the_settings_are_those_of_training(checkpoint):
    config = finetuning.train_config(checkpoint, Options(fine_tune_epochs=7))
    assert (config.epochs, config.batch_size, config.seed) == (7, 4, 3)
    assert config.learning_rate == 0.001
    assert (config.specaugment_start, config.sorted_epochs, config.patience) == (0.0, 0, 0)
    options = Options(fine_tune_epochs=1, fine_tune_learning_rate=0.01)
    assert finetuning.train_config(checkpoint, options).learning_rate == 0.01
    checkpoint.history = []
    assert finetuning.train_config(checkpoint, options).batch_size == 16


def test_all_layers_learn_from_any_data(checkpoint, corpus):
    """A model taught in steps, on several corpora and by another network, as the English one."""
    checkpoint.history[0]["config"] = TRAINED | {
        "corpus_weights": "books=0.5,phone=2", "freeze_blocks": 1, "freeze_epochs": 3,
        "teacher": "no.such:network",
    }  # fmt: skip
    options = Options(fine_tune_epochs=1, fine_tune_data=str(corpus))
    before = copy.deepcopy(checkpoint.model.blocks[0])  # was frozen
    tuned = finetuning.fine_tune(checkpoint, checkpoint.model, options, None).blocks[0]
    pairs = zip(before.parameters(), tuned.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_says_what_of_the_data_is_not_used(checkpoint, tmp_path, capsys):
    """A limit of the model's own training leaves out recordings of another user's."""
    folder = write_corpus(tmp_path / "mine")
    (folder / "dev.json").unlink()
    checkpoint.history[0]["config"] = TRAINED | {"max_duration": 0.9}
    core.run(checkpoint, steps(fine_tune_epochs=1, fine_tune_data=str(folder)))
    printed = capsys.readouterr().out
    assert printed.count("longer than 0.9 s") == 1
    assert printed.count("no dev* split: held out") == 1


@pytest.mark.parametrize("schedule", ["gradual", "one-shot"])
def test_a_stopped_run_goes_on_to_the_same_bits(checkpoint, tmp_path, schedule, monkeypatch):
    whole = core.run(copy.deepcopy(checkpoint), steps(schedule=schedule), None, tmp_path / "a")
    package = registry.method("pruning")
    update, calls = package.update, []

    def stopping(config, model, fraction):
        calls.append(fraction)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        update(config, model, fraction)

    monkeypatch.setattr(package, "update", stopping)
    with pytest.raises(KeyboardInterrupt):
        core.run(copy.deepcopy(checkpoint), steps(schedule=schedule), None, tmp_path / "b")
    assert len(calls) == 5
    with pytest.raises(ValueError, match="interrupted run with other options"):
        core.run(copy.deepcopy(checkpoint), steps(sparsity=0.1), None, tmp_path / "b")
    resumed = core.run(copy.deepcopy(checkpoint), steps(schedule=schedule), None, tmp_path / "b")
    assert same(resumed.model, whole.model)
    finetuning.forget(tmp_path / "b")
    assert not list((tmp_path / "b").iterdir())


def test_a_finished_step_is_not_repeated(checkpoint, tmp_path, monkeypatch):
    """A recipe killed in its second fine-tuning takes the first one's result."""
    recipe = steps(sparsity=0.2) + steps(sparsity=0.4)
    first = core.run(copy.deepcopy(checkpoint), recipe, None, tmp_path)
    monkeypatch.setattr(finetuning.FineTuner, "train_step", None)
    again = core.run(copy.deepcopy(checkpoint), recipe, None, tmp_path)
    assert same(first.model, again.model)


def test_structured_pruning_resumes_with_its_shapes(checkpoint, tmp_path, monkeypatch):
    options = {"pruning_type": "structured", "sparsity": 0.5}
    whole = core.run(copy.deepcopy(checkpoint), steps(**options), None, tmp_path)
    monkeypatch.setattr(
        structured, "norm_importance",
        lambda model, found: {k: torch.arange(g.units).float() for k, g in found.items()},
    )  # fmt: skip
    again = core.run(copy.deepcopy(checkpoint), steps(**options), None, tmp_path)
    assert same(whole.model, again.model)


def leave_teacher(checkpoint):
    """Perturbs the checkpoint's model; returns a copy of it as it was, and all the speech."""
    teacher = copy.deepcopy(checkpoint.model)
    with torch.no_grad():
        for p in checkpoint.model.parameters():
            p += 0.1 * torch.randn_like(p)
    return teacher, calibration.load(checkpoint, batch_size=100).batches[0]


def test_distillation_brings_the_model_to_its_teacher(checkpoint):
    """Nothing but the teacher counts: a perturbed copy comes closer to it."""
    teacher, batch = leave_teacher(checkpoint)

    @torch.no_grad()
    def distance(model):
        a, b = (m(batch.features, batch.feature_lengths) for m in (model, teacher))
        return float(imitation.divergence(a.log_probs, b.log_probs, a.lengths))

    before = distance(checkpoint.model)
    options = Options(fine_tune_epochs=6, fine_tune_learning_rate=0.004, distill_weight=1.0)
    tuned = finetuning.fine_tune(checkpoint, teacher, options, None)
    assert distance(tuned) < 0.5 * before


def test_divergence_is_that_of_the_definition():
    a, b = (torch.log_softmax(torch.randn(2, 5, 7), dim=2) for _ in range(2))
    expected = nn.functional.kl_div(a[0], b[0], log_target=True, reduction="sum")
    expected += nn.functional.kl_div(a[1, :3], b[1, :3], log_target=True, reduction="sum")
    torch.testing.assert_close(imitation.divergence(a, b, torch.tensor([5, 3])), expected)
    assert float(imitation.divergence(a, a, torch.tensor([5, 5]))) == 0


def test_hints_bring_the_blocks_to_those_of_the_teacher(checkpoint):
    teacher, batch = leave_teacher(checkpoint)

    @torch.no_grad()
    def distance(model):
        kept = [imitation.BlockOutputs(m) for m in (model, teacher)]
        for m in (model, teacher):
            output = m(batch.features, batch.feature_lengths)
        result = imitation.distance(kept[0].last, kept[1].last, output.lengths)
        for one in kept:
            one.remove()
        return float(result)

    before, tuned = distance(checkpoint.model), {}
    for weight in (0.0, 2.0):
        options = Options(
            fine_tune_epochs=6, fine_tune_learning_rate=0.004, distill_weight=1.0,
            hint_weight=weight,
        )  # fmt: skip
        tuned[weight] = distance(
            finetuning.fine_tune(copy.deepcopy(checkpoint), teacher, options, None)
        )
    assert tuned[2.0] < 0.7 * tuned[0.0] < before
    assert not teacher._forward_pre_hooks
    assert not any(block._forward_hooks for block in teacher.blocks)


def test_distance_is_the_share_of_the_power_in_valid_frames():
    a, b = torch.randn(2, 2, 5, 7).unbind()
    valid = [torch.cat([x[0], x[1, :3]]) for x in (a, b)]
    share = (valid[0] - valid[1]).square().sum() / valid[1].square().sum()
    lengths = torch.tensor([5, 3])
    found = imitation.distance([a, b], [b, b], lengths)
    torch.testing.assert_close(found, 8 * share / 2)


def test_data_is_needed_before_any_work(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(registry.method("pruning"), "prepare", None)
    checkpoint.data = {"train": str(tmp_path / "gone")}
    with pytest.raises(ValueError, match=r"gone: the data .* is gone: give --fine_tune_data"):
        core.run(checkpoint, steps(), None, tmp_path / "out")
    checkpoint.data = {}
    with pytest.raises(ValueError, match=r"names no training data: give --fine_tune_data"):
        core.run(checkpoint, steps(), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_data_can_be_named(checkpoint, corpus):
    checkpoint.data = {}
    core.run(checkpoint, steps(fine_tune_data=str(corpus), fine_tune_epochs=1))


def test_integer_layers_are_not_fine_tuned(checkpoint):
    packed = core.run(checkpoint, [recipes.make_step("quantization", {"include": "blocks.0.*"})])
    with pytest.raises(ValueError, match=r"integer layers \(blocks.0.ff1.up\)"):
        core.run(packed, steps(include="blocks.1.*"))


@pytest.mark.parametrize(
    "options",
    [
        {"fine_tune_epochs": -1},
        {"distill_weight": 1.5},
        {"fine_tune_learning_rate": -1.0},
        {"hint_weight": -1.0},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Options(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"fine_tune_data": "x"},
        {"distill_weight": 0.5},
        {"fine_tune_learning_rate": 1e-3},
        {"hint_weight": 0.5},
    ],
)
def test_options_without_epochs_are_refused(options):
    for epochs in ({}, {"fine_tune_epochs": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is for fine-tuning"):
            recipes.make_step("pruning", options | epochs)
    assert recipes.make_step("pruning", {"fine_tune_epochs": 0}).tuning == Options()


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_dynamic_int8_hears_one_dev_utterance_at_a_time(checkpoint, precision, monkeypatch):
    """As in evaluate.py, since its activations have one scale a call. Others hear batches."""
    shapes, listen = [], finetuning.FineTuner.listen

    def watched(self, model):
        hook = model.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape[:2]))
        result = listen(self, model)
        hook.remove()
        return result

    monkeypatch.setattr(finetuning.FineTuner, "listen", watched)
    core.run(checkpoint, steps("quantization", precision=precision, fine_tune_epochs=1))
    dev = calibration.speech(checkpoint, checkpoint.data["train"], "dev")
    if precision == "int8":
        assert shapes == [(1, int(100 * u.duration) + 1) for u in dev]
    else:
        assert len(shapes) == 1


def test_a_broken_run_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("no such audio")

    monkeypatch.setattr(finetuning.FineTuner, "train_step", broken)
    with pytest.raises(OSError, match="no such audio"):
        core.run(checkpoint, steps(), None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_method_can_be_fine_tuned(checkpoint, tmp_path):
    for number, (method, options) in enumerate(
        [
            ("factorization", {"rank": 3}),
            ("pruning", {"pruning_type": "structured"}),
            ("clustering", {"num_clusters": 4}),
            ("quantization", {"precision": "ternary"}),
            ("quantization", {"precision": "int2"}),
        ]
    ):
        result = core.run(copy.deepcopy(checkpoint), steps(method, fine_tune_epochs=1, **options))
        path = tmp_path / f"{number}.pt"
        save_checkpoint(path, result)
        again = load_checkpoint(path).model
        x = torch.randn(1, 80, 80)
        assert torch.equal(again(x).log_probs, result.model(x).log_probs)


@pytest.mark.parametrize("spoilt", ["trained", "untrained"])
def test_the_better_of_trained_and_untrained_is_kept(checkpoint, monkeypatch, capsys, spoilt):
    """By held-out speech: fine-tuning may lose to what rounding alone gives. One says nothing."""
    learnt = core.run(checkpoint, steps("recovery", fine_tune_epochs=8))
    plain = core.run(copy.deepcopy(learnt), steps("quantization", fine_tune_epochs=0))
    package = registry.method("quantization")
    name = "freeze" if spoilt == "trained" else "apply"
    make = getattr(package, name)

    def silent(*args):
        model = make(*args)
        model.head.bias.data[0] = 1000
        return model

    monkeypatch.setattr(package, name, silent)
    kept = core.run(learnt, steps("quantization", fine_tune_epochs=1))
    said = capsys.readouterr().out
    if spoilt == "trained":
        assert "kept: without\n" in said
        assert same(kept.model, plain.model)
        assert "fine_tune_epochs" not in kept.history[-1]["config"]
    else:
        assert "kept: with\n" in said
        assert kept.model.head.bias.max() < 1000
        assert kept.history[-1]["config"]["fine_tune_epochs"] == 1


@pytest.mark.parametrize(("precision", "share"), [("int4", 1 / 16), ("int2", 1 / 4)])
def test_fine_steps_are_trained_with_a_small_rate(checkpoint, monkeypatch, precision, share):
    rates = []
    monkeypatch.setattr(
        finetuning, "FineTuner", lambda _, config, *rest: rates.append(config.learning_rate)
    )
    with pytest.raises(AttributeError):  # no tuner was made
        core.run(checkpoint, steps("quantization", precision=precision))
    assert rates == [pytest.approx(TRAINED["learning_rate"] * share)]


def test_co_training_is_for_fine_tuning(checkpoint):
    """And is said before any step is taken."""
    options = {"precision": "int2", "co_training": "int4"}
    with pytest.raises(ValueError, match="co_training is for fine-tuning"):
        core.run(checkpoint, [recipes.make_step("quantization", options)])
    result = core.run(checkpoint, steps("quantization", fine_tune_epochs=1, **options))
    assert result.history[-1]["config"]["co_training"] == "int4"
    assert type(result.model.blocks[0].ff1.up).__name__ == "QuantLinear"


def test_held_out_measures_against_the_first_model(checkpoint, corpus, tmp_path, capsys):
    other = copy.deepcopy(checkpoint)
    leave_teacher(other)
    for name, one in (("a.pt", checkpoint), ("b.pt", other)):
        save_checkpoint(tmp_path / name, one)
    out = tmp_path / "r.json"
    paths = [str(tmp_path / name) for name in ("a.pt", "b.pt")]
    flags = ["--model_path", *paths, "--data", str(corpus), "--output_path", str(out)]
    assert held_out.main(flags) == 0
    first, second = json.loads(out.read_text())["results"]
    assert first["divergence"] == 0 < second["divergence"]
    batch = dev_batch(checkpoint, corpus)
    with torch.no_grad():
        output = checkpoint.model(batch.features, batch.feature_lengths)
    loss = float(ctc_loss(output, batch, 4, 0.0)) / int(batch.target_lengths.sum())
    assert first["ctc_loss"] == pytest.approx(loss, abs=1e-4)
    checkpoint.tokenizer = Tokenizer.characters("abd")
    save_checkpoint(tmp_path / "b.pt", checkpoint)
    assert held_out.main(flags) == 2
    assert "other tokens" in capsys.readouterr().err


def dev_batch(checkpoint, corpus):
    """All held-out utterances of the corpus in one padded batch."""
    found = calibration.speech(checkpoint, str(corpus), "dev")
    dataset = BatchDataset(found, checkpoint.tokenizer, checkpoint.features)
    return dataset[0, False, tuple(range(len(found)))]
