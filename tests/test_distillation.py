"""Distillation: students, losses, teachers, caches, speech without transcripts, resuming."""

import copy
import json
import os
import shutil
import signal

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

from asr.measure.agreement import frame_agreement, text_agreement
from asr.network.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from asr.network.model import ConformerCTC
from asr.runtime.config import ModelConfig
from asr.runtime.tokenizer import Tokenizer
from asr.training.data import BatchDataset
from compress import core, imitation, recipes
from compress.distillation import cache as caching
from compress.distillation import training
from compress.distillation.method import Config, apply
from compress.distillation.student import build_student, student_config
from compress.distillation.teacher import answers, load_teachers
from tests.corpus import tone_waveform, write_corpus

TRAINED = {
    "epochs": 3, "batch_size": 4, "learning_rate": 0.004, "num_workers": 0, "warmup_steps": 5,
    "precision": "float32", "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    """Recordings without transcripts, one in a folder of its own."""
    folder = tmp_path_factory.mktemp("silent")
    (folder / "more").mkdir()
    for number, text in enumerate(("abc b", "cab", "ba")):
        path = folder / ("more" if number else "") / f"{number}.wav"
        soundfile.write(path, tone_waveform(text, number), 16000, subtype="PCM_16")
    return folder


def build(corpus="nowhere", seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=5, d_model=16, n_layers=4, n_heads=2, conv_kernel_size=7,
        subsampling_channels=8, dropout=0.0,
    )  # fmt: skip
    model = ConformerCTC(ModelConfig(**sizes | changes)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name and tensor.is_floating_point():
                tensor += 0.1 * torch.rand_like(tensor)
        model.head.weight.mul_(3)
    history = [{"step": "train", "config": TRAINED, "epoch": 3, "dev_wer": 0.5}]
    return Checkpoint(
        model, Tokenizer.characters("abc"), data={"train": str(corpus)}, history=history
    )


def distilled(checkpoint, folder=None, epochs=1, **options):
    options = {"fine_tune_epochs": epochs, "n_layers": 2, **options}
    return core.run(
        copy.deepcopy(checkpoint), [recipes.make_step("distillation", options)], None, folder
    )


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def stop_at_step(number, monkeypatch):
    """From now on a distillation is interrupted behind that step, as by Ctrl-C."""
    step = training.Distiller.train_step

    def stopping(self, batches, progress):
        result = step(self, batches, progress)
        if self.learner.step == number:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(training.Distiller, "train_step", stopping)


# ---- students


def test_half_the_layers_are_every_second_of_the_teachers():
    teacher = build().model
    student = apply(teacher, Config(n_layers=2))
    assert len(student.blocks) == 2
    for i, block in enumerate(student.blocks):
        assert same(block, teacher.blocks[2 * i + 1])
    assert same(student.subsampling, teacher.subsampling)
    assert same(student.head, teacher.head)


def test_a_student_as_large_as_its_teacher_is_its_teacher():
    teacher = build(n_layers=3, intermediate_layers=(2,), self_conditioned=True).model
    assert same(apply(teacher, Config()), teacher)
    x = torch.randn(1, 80, 80)
    filled = ConformerCTC(teacher.config).eval()
    from compress.distillation.student import fill

    with torch.no_grad():
        fill(filled, teacher)
    assert torch.equal(filled(x).log_probs, teacher(x).log_probs)


def test_a_narrower_student_takes_the_units_of_largest_weights():
    """A teacher half of whose units are near nothing is its own half."""
    teacher = build(n_layers=1).model
    with torch.no_grad():
        for name, tensor in teacher.state_dict().items():
            if tensor.dim() == 2 and tensor.shape[1] == 16 and "position" not in name:
                tensor[:, 1::2] = 0
            if (
                tensor.dim() == 2
                and tensor.shape[0] == 16
                and name.endswith(("down.weight", "out.weight"))
            ):
                tensor[1::2] = 0
    student = apply(teacher, Config(d_model=8))
    even = torch.arange(0, 16, 2)
    assert student.config.d_model == 8
    assert torch.equal(student.head.weight, teacher.head.weight[:, even])
    assert torch.equal(student.subsampling.out.weight, teacher.subsampling.out.weight[even])
    ours, theirs = student.blocks[0], teacher.blocks[0]
    assert torch.equal(ours.ff1.norm.weight, theirs.ff1.norm.weight[even])
    rows = {tuple(row) for row in theirs.ff1.up.weight[:, even].tolist()}
    assert {tuple(row) for row in ours.ff1.up.weight.tolist()} <= rows
    assert ours.ff1.up.weight.shape == (32, 8)


def test_a_shared_student_has_the_teachers_block_at_every_depth():
    teacher = build().model
    student = apply(teacher, Config(share_layers=1, own_norms=True))
    assert len(student.blocks) == 1
    assert student.config.n_layers == 4
    assert torch.equal(student.blocks[0].ff1.up.weight, teacher.blocks[3].ff1.up.weight)
    for norm in student.blocks[0].conv.batch_norm:
        assert torch.equal(norm.running_var, teacher.blocks[3].conv.batch_norm.running_var)


def test_a_random_student_is_random_and_the_same_again():
    teacher = build().model
    a, b, c = (apply(teacher, Config(initial="random", seed=s)) for s in (1, 1, 2))
    assert same(a, b)
    assert not same(a, c)
    assert not torch.equal(a.head.weight, teacher.head.weight)


def test_presets_and_intermediate_layers():
    config = ModelConfig(n_layers=8, intermediate_layers=(4,), self_conditioned=True)
    half = student_config(config, "", {"n_layers": 4})
    assert (half.intermediate_layers, half.self_conditioned) == ((2,), True)
    one = student_config(config, "", {"n_layers": 1})
    assert (one.intermediate_layers, one.self_conditioned) == ((), False)
    tiny = student_config(config, "tiny", {})
    assert (tiny.d_model, tiny.n_layers, tiny.subsampling) == (144, 4, config.subsampling)


def test_pruned_teachers_make_fewer_blocks_but_no_shared_ones():
    pruned = core.run(
        build(), [recipes.make_step("pruning", {"pruning_type": "structured", "sparsity": 0.5})]
    ).model
    student = apply(pruned, Config(n_layers=2))
    assert same(student.blocks[0], pruned.blocks[1])
    for options in ({"share_layers": 1}, {"d_model": 8}):
        with pytest.raises(ValueError, match="blocks differ in shape"):
            apply(pruned, Config(**options))
    packed = core.run(build(), [recipes.make_step("quantization", {})]).model
    with pytest.raises(ValueError, match="distillation comes before clustering and quantization"):
        apply(packed, Config(n_layers=2))


def test_a_student_reloads(tmp_path):
    checkpoint = build(n_layers=3)
    for number, options in enumerate(({"n_layers": 2}, {"share_layers": 2}, {"d_model": 8})):
        result = core.run(
            copy.deepcopy(checkpoint),
            [recipes.make_step("distillation", {"fine_tune_epochs": 0, **options})],
        )
        save_checkpoint(tmp_path / f"{number}.pt", result)
        again = load_checkpoint(tmp_path / f"{number}.pt")
        assert same(again.model, result.model)


# ---- the loss


def test_plain_divergence_is_hintons():
    a, b = (F.log_softmax(torch.randn(2, 5, 4), dim=2) for _ in range(2))
    lengths = torch.tensor([5, 3])
    t = 2.5
    expected = sum(
        t * t * F.kl_div(
            F.log_softmax(a[i, :n] / t, 1), F.log_softmax(b[i, :n] / t, 1), reduction="sum",
            log_target=True,
        )
        for i, n in enumerate(lengths.tolist())
    )  # fmt: skip
    torch.testing.assert_close(imitation.divergence(a, b, lengths, t), expected)


def test_blanks_weigh_and_go():
    """By the chain rule plain = blank or not + what else, weighted by the share that is not."""
    a, b = (F.log_softmax(3 * torch.randn(1, 6, 4), dim=2) for _ in range(2))
    lengths = torch.tensor([6])
    share = 1 - b[..., 0].exp()
    each = (b.exp() * (b - a)).sum(2)
    weighted = (each * share / share.mean()).sum()
    torch.testing.assert_close(imitation.divergence(a, b, lengths, 1, "weighted"), weighted)
    two = [torch.stack([x[..., 0], torch.log1p(-x[..., 0].exp())], 2) for x in (a, b)]
    first = (two[1].exp() * (two[1] - two[0])).sum()
    rest = imitation.divergence(a, b, lengths, 1, "removed") * share.mean()
    torch.testing.assert_close(first + rest, each.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blanks", imitation.BLANKS)
def test_padding_and_equal_models_cost_nothing(blanks):
    a, b = (F.log_softmax(torch.randn(2, 6, 4), dim=2) for _ in range(2))
    lengths = torch.tensor([4, 6])
    before = imitation.divergence(a, b, lengths, 2, blanks)
    a[0, 4:], b[0, 4:] = float("nan"), float("nan")
    torch.testing.assert_close(imitation.divergence(a, b, lengths, 2, blanks), before)
    assert float(imitation.divergence(b, b, lengths, 2, blanks)) == 0


def test_counterparts_end_at_the_last():
    assert [imitation.counterpart(i, 4, 8) for i in range(4)] == [1, 3, 5, 7]
    assert [imitation.counterpart(i, 3, 8) for i in range(3)] == [2, 5, 7]
    assert [imitation.counterpart(i, 4, 4) for i in range(4)] == [0, 1, 2, 3]


# ---- teachers and caches


def test_several_teachers_are_their_mean(tmp_path):
    first, second = build(), build(seed=1)
    for name, one in (("a.pt", first), ("b.pt", second)):
        save_checkpoint(tmp_path / name, one)
    teachers = load_teachers(f"{tmp_path / 'a.pt'}, {tmp_path / 'b.pt'}", first)
    x, lengths = torch.randn(2, 80, 80), torch.tensor([80, 60])
    found = answers(teachers, x, lengths, 20, "float32")
    expected = (
        first.model(x, lengths).log_probs.exp() + second.model(x, lengths).log_probs.exp()
    ) / 2
    torch.testing.assert_close(found.exp()[0], expected[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": Tokenizer.characters("abd")}, r"tokens .*'c' 'd'"),
        ({"model": {"subsampling_factor": 8}}, "frame rate .one of 8 frames, not of 4"),
        ({"features": {"hop_length": 200}}, "features .hop_length 200, not 160"),
    ],
)
def test_other_teachers_are_refused_with_what_differs(change, message, corpus, tmp_path):
    other = build(corpus, **change.get("model", {}))
    if "tokenizer" in change:
        other.tokenizer = change["tokenizer"]
    if "features" in change:
        other.features = type(other.features)(**change["features"])
    save_checkpoint(tmp_path / "other.pt", other)
    with pytest.raises(ValueError, match=message):
        distilled(build(corpus), teacher=str(tmp_path / "other.pt"))


def test_a_cache_returns_what_the_teacher_said(corpus, tmp_path):
    checkpoint = build(corpus)
    teacher = load_teachers("", checkpoint)
    found = distilled(checkpoint, cache=str(tmp_path / "cache"), cache_tokens=4)
    assert np.isfinite(float(found.model.head.weight.sum()))
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    utterances = core.finetuning.load_splits(str(corpus), seed=0).train
    kept = caching.Cache(tmp_path / "cache", index["teacher"], 5, utterances)
    batch = BatchDataset(utterances, checkpoint.tokenizer, checkpoint.features)[0, False, (2, 0)]
    expected = checkpoint.model(batch.features, batch.feature_lengths)
    read = kept.answers(batch.indices, expected.log_probs.shape[1])
    for i, n in enumerate(expected.lengths.tolist()):  # one of five tokens is the rest: exact
        difference = read[i, :n].exp() - expected.log_probs[i, :n].exp()
        assert difference.abs().max() < 1e-3
        assert read[i, :n].exp().sum(1).sub(1).abs().max() < 2e-3
    assert teacher[0].name == "the model given"


def test_nothing_moves_frames_away_from_a_cache(corpus):
    checkpoint = build(corpus)
    checkpoint.history = [{"step": "train", "config": {"silence": 0.3, "speed": 0.1}}]
    for cache, moves in (("", (0.3, 0.1)), ("cache", (0.0, 0.0))):
        settings = training.Run(Config(cache=cache), []).settings(
            checkpoint, core.finetuning.Options(fine_tune_epochs=1)
        )
        assert (settings.silence, settings.speed) == moves


def test_caches_of_others_are_refused(corpus, tmp_path):
    checkpoint = build(corpus)
    place = tmp_path / "cache"
    distilled(checkpoint, cache=str(place))
    before = (place / "index.json").read_bytes()
    with pytest.raises(ValueError, match="a cache of another teacher"):
        distilled(build(corpus, seed=5), cache=str(place))
    copied = shutil.copytree(corpus, tmp_path / "copy")
    distilled(build(copied), cache=str(place))  # the same recordings elsewhere
    soundfile.write(copied / "train-0.wav", tone_waveform("ab", 99), 16000, subtype="PCM_16")
    with pytest.raises(ValueError, match=r"no answers about .*train-0.wav, which was changed"):
        distilled(build(copied), cache=str(place))
    assert (place / "index.json").read_bytes() == before
    (place / "values.npy").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged cache"):
        distilled(checkpoint, cache=str(place))


# ---- the run


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 4.0, "alpha": 0.0},
        {"d_model": 8, "hint_weight": 1.0, "alpha": 0.0},
    ],
)
def test_a_student_comes_nearer_to_its_teacher(options, corpus):
    checkpoint = build(corpus)
    utterances = core.finetuning.load_splits(str(corpus), seed=0).train
    batch = BatchDataset(utterances, checkpoint.tokenizer, checkpoint.features)[
        0, False, tuple(range(len(utterances)))
    ]

    def far(model):
        with torch.no_grad():
            a, b = (m(batch.features, batch.feature_lengths) for m in (model, checkpoint.model))
        return float(imitation.divergence(a.log_probs, b.log_probs, a.lengths))

    start = distilled(
        checkpoint, epochs=0, **{k: v for k, v in options.items() if k != "hint_weight"}
    )
    result = distilled(checkpoint, epochs=4, **options)
    assert far(result.model) < 0.7 * far(start.model)
    assert result.history[-1]["step"] == "distillation"


def test_speech_without_transcripts_is_learnt_from(corpus, silent, tmp_path):
    checkpoint = build(corpus)
    with_it = distilled(checkpoint, unlabelled=str(silent))
    without = distilled(checkpoint)
    assert not same(with_it.model, without.model)
    found = training.unlabelled(str(silent), 30.0)
    assert [u.text for u in found] == [""] * 3
    listed = training.unlabelled(str(corpus / "train.json"), 30.0)
    assert {u.text for u in listed} == {""}
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (tmp_path / "empty", "holds no recordings"),
        (tmp_path / "none", "not a folder or manifest"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            distilled(checkpoint, unlabelled=str(folder))


def test_transcripts_count_only_where_they_are(corpus):
    checkpoint = build(corpus)
    utterances = core.finetuning.load_splits(str(corpus), seed=0).train[:3]
    mixed = [
        utterances[0],
        type(utterances[0])(utterances[1].audio_filepath, 0.4, ""),
        utterances[2],
    ]
    dataset = BatchDataset(mixed, checkpoint.tokenizer, checkpoint.features)
    batch = dataset[0, False, (0, 1, 2)]
    output = checkpoint.model(batch.features, batch.feature_lengths)
    part, rest = training.with_texts(output, batch)
    assert rest.indices == (0, 2)
    assert torch.equal(part.log_probs, output.log_probs[[0, 2]])
    assert rest.targets.dtype == torch.int64


def test_it_logs_agreement_and_resumes_to_the_bit(corpus, silent, tmp_path, monkeypatch):
    """Stopped at any step, with projections and speech without transcripts."""
    checkpoint = build(corpus)
    options = {"epochs": 2, "d_model": 8, "hint_weight": 1.0, "unlabelled": str(silent)}
    whole = distilled(checkpoint, tmp_path / "whole", **options)
    log = (tmp_path / "whole" / "fine_tuning_2" / "log.jsonl").read_text().splitlines()
    entry = json.loads(log[-1])
    assert {"dev_wer", "teacher_dev_wer", "agreement", "agreement_non_blank"} <= entry.keys()
    stop_at_step(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        distilled(checkpoint, tmp_path / "parts", **options)
    monkeypatch.undo()
    again = distilled(checkpoint, tmp_path / "parts", **options)
    assert same(again.model, whole.model)


def test_agreement_of_frames_and_texts():
    mine, theirs = [np.array([0, 1, 2, 0])], [np.array([0, 1, 1, 0])]
    assert frame_agreement(mine, theirs) == {"frames": 0.75, "non_blank": 0.5}
    with pytest.raises(ValueError, match="other frames"):
        frame_agreement(mine, [np.array([0, 1])])
    found = text_agreement(["a b c", "d"], ["a b x", "d"])
    assert found == {"words": 0.75, "utterances": 0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.5}, "temperature 0.5 must lie in"),
        ({"temperature": 9.0}, "temperature 9.0 must lie in"),
        ({"alpha": -0.1}, "alpha -0.1 must lie in"),
        ({"alpha": 1.1}, "alpha 1.1 must lie in"),
        ({"preset": "huge"}, "preset 'huge' is not one of"),
        ({"blanks": "none"}, "blanks 'none' is not one of plain"),
        ({"distill_weight": 0.4}, "unknown option 'distill_weight' of distillation"),
        ({"share_layers": -1}, "share_layers -1 is out of range"),
        ({"cache_tokens": 0}, "cache_tokens 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        recipes.make_step("distillation", options)


def test_building_needs_sizes_that_exist():
    with pytest.raises(ValueError, match="must be even and divisible"):
        build_student(
            build().model, student_config(build().model.config, "", {"d_model": 9}), "teacher"
        )
