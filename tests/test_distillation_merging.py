"""Students of a teacher that merges frames between its blocks, as the English model does."""

import copy

import pytest
import torch

from asr.network.checkpoint import load_checkpoint, save_checkpoint
from asr.runtime.config import PRESETS
from compress import core, recipes
from compress.distillation.method import Config, apply
from compress.distillation.student import counterparts, student_config
from compress.imitation import BlockOutputs
from tests.corpus import write_corpus
from tests.test_distillation import build, distilled, same

MERGING = dict(
    n_layers=6, subsampling_factor=2, reduction_position=2, reduction_factor=2,
    reduction_d_model=24, plain_blocks=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def teacher(corpus):
    return build(corpus, **MERGING)


def test_fewer_blocks_come_from_both_sides(teacher):
    student = apply(teacher.model, Config(n_layers=3))
    config = student.config
    assert (config.reduction_position, config.plain_blocks, config.total_factor) == (1, 1, 4)
    for block, depth in zip(student.blocks, (1, 3, 5), strict=True):
        assert same(block, teacher.model.blocks[depth])
    assert same(student.reduction, teacher.model.reduction)
    x = torch.randn(1, 80, 80)
    assert student(x).log_probs.shape == teacher.model(x).log_probs.shape


@pytest.mark.parametrize("n_layers", [2, 3, 4, 5, 6])
def test_every_depth_has_blocks_before_and_behind(n_layers, teacher):
    config = student_config(teacher.model.config, "", {"n_layers": n_layers})
    found = counterparts(config, teacher.model.config)
    assert found == sorted(set(found))
    assert (found[0] < 2, found[-1]) == (True, 5)
    assert config.plain_blocks == config.reduction_position == sum(depth < 2 for depth in found)


def test_a_narrower_student_is_narrower_on_both_sides(teacher):
    student = apply(teacher.model, Config(d_model=8))
    assert (student.config.d_model, student.config.reduction_d_model) == (8, 12)
    kept = {tuple(row) for row in teacher.model.reduction.out.weight.tolist()}
    for row in student.reduction.out.weight:  # 2 * 8 of the 2 * 16 inputs of one of the outputs
        assert any(set(row.tolist()) <= set(whole) for whole in kept)
    stem = {round(x, 6) for x in teacher.model.subsampling.out.weight.flatten().tolist()}
    assert {round(x, 6) for x in student.subsampling.out.weight.flatten().tolist()} <= stem
    assert student.head.weight.shape == (5, 12)


def test_a_narrow_student_of_the_largest_units_is_its_teacher(teacher):
    """Where all other units are zero, nothing is lost by leaving them out."""
    model = copy.deepcopy(teacher.model)
    again = apply(model, Config(d_model=16))
    x = torch.randn(1, 80, 80)
    assert torch.equal(again(x).log_probs, model(x).log_probs)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"preset": "tiny"}, PRESETS["tiny"] | {"share_layers": 0}),
        ({"share_layers": 1}, {"d_model": 24, "n_layers": 4, "share_layers": 1}),
        ({"share_layers": 2, "n_layers": 6, "own_norms": True}, {"d_model": 24, "n_layers": 6}),
    ],
)
def test_presets_and_shared_blocks_merge_frames_at_once(options, sizes, teacher):
    student = apply(teacher.model, Config(**options))
    config = student.config
    for name in ("d_model", "n_layers", "share_layers"):
        assert getattr(config, name) == sizes.get(name, getattr(config, name))
    assert (config.subsampling_factor, config.reduction_position, config.plain_blocks) == (4, 0, 0)
    if "preset" not in options:  # blocks of that rate are its own
        weight = student.blocks[-1].ff1.up.weight
        assert torch.equal(weight, teacher.model.blocks[5].ff1.up.weight)
        assert torch.equal(student.head.weight, teacher.model.head.weight)


def test_one_layer_is_too_few(teacher):
    with pytest.raises(ValueError, match="needs 2 or more"):
        apply(teacher.model, Config(n_layers=1))


@pytest.mark.parametrize(
    "options",
    [
        {"n_layers": 4},
        {"d_model": 8, "hint_weight": 1.0},
        {"share_layers": 1, "hint_weight": 1.0},
        {"n_layers": 3, "temperature": 4.0, "blanks": "weighted", "cache": "cache"},
    ],
)
def test_such_students_learn_and_reload(options, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"n_layers": 6} | options
    result = distilled(teacher, **sizes)
    sizes.pop("hint_weight", None)
    before = distilled(teacher, epochs=0, **sizes)
    assert not same(result.model, before.model)
    save_checkpoint(tmp_path / "student.pt", result)
    assert same(load_checkpoint(tmp_path / "student.pt").model, result.model)


def test_hints_help_to_recover_such_a_model(teacher):
    """Fine-tuning compares the blocks behind the merging."""
    options = {"rank": 4, "fine_tune_epochs": 1, "hint_weight": 1.0}
    step = recipes.make_step("factorization", options)
    result = core.run(copy.deepcopy(teacher), [step], None, None)
    outputs = BlockOutputs(result.model)
    result.model(torch.randn(1, 80, 80))
    assert [x.shape for x in outputs.last] == [(1, 20, 24)] * 4
