"""Recipes run stage by stage: killed in every stage they go on, and end with the same bits."""

import json
import os
import re
import signal

import pytest
import torch

from asr.measure.final_report import Targets, read_stages
from asr.network.checkpoint import load_checkpoint, save_checkpoint
from asr.training.learner import Learner
from compress import cli, core, pipeline, recipes
from compress.pruning import method as pruning
from tests.corpus import write_corpus
from tests.test_distillation import build, same

STEPS: list[dict[str, object]] = [
    {"method": "distillation", "n_layers": 2, "fine_tune_epochs": 1},
    {"method": "pruning", "sparsity": 0.2, "schedule": "linear", "steps": 2, "fine_tune_epochs": 2},
    {"method": "recovery", "fine_tune_epochs": 1},
    {"method": "quantization", "precision": "int8"},
]
STAGES = ["1_distillation", "2_pruning", "3_pruning", "4_recovery", "5_quantization"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def source(corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "model.pt"
    save_checkpoint(path, build(corpus))
    return path


@pytest.fixture
def no_export(monkeypatch):
    """Tracing takes seconds a stage and is tested elsewhere: sizes alone are measured."""

    def sizes(model, place, test_data):
        place.mkdir(parents=True, exist_ok=True)
        size = model.stat().st_size
        figures = {"bytes": size, "onnx_bytes": size, "parameters": 1}
        (place / "figures.json").write_text(json.dumps(figures))

    monkeypatch.setattr(pipeline, "measure", sizes)


def arguments(source, folder, steps=STEPS, *more):
    recipe = folder.parent / "recipe.json"
    recipe.write_text(json.dumps(steps))
    flags = ["--model_path", str(source), "--output_dir", str(folder), "--recipe", str(recipe)]
    return [*flags, *more]


def run(source, folder, steps=STEPS, *more):
    return cli.main(arguments(source, folder, steps, *more))


def in_child(function):
    """Runs in a forked process; returns its exit status as os.waitpid gives it."""
    child = os.fork()
    if child == 0:
        os._exit(function())
    return os.waitpid(child, 0)[1]


def kill_at(monkeypatch, stage):
    """Whoever starts this stage is killed by SIGKILL: while it trains, else while it changes."""
    take, step = core.take, Learner.train_step
    now = []

    def marked(one, *args):
        now.append(one.method)
        if stage == len(now) and not one.tuning.fine_tune_epochs:
            os.kill(os.getpid(), signal.SIGKILL)
        return take(one, *args)

    def deadly(learner, *args):
        result = step(learner, *args)
        if stage == len(now) and learner.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    monkeypatch.setattr(core, "take", marked)
    monkeypatch.setattr(Learner, "train_step", deadly)


def test_killed_in_every_stage_it_ends_with_the_same_bits(
    source, no_export, monkeypatch, tmp_path, capsys
):
    torch.set_num_threads(1)  # a forked process has one
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(source, whole) == 0
    for number, name in enumerate(STAGES, 1):
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "rehearse", lambda *_: None)
            kill_at(patch, 1)  # the first stage of those not finished
            assert in_child(lambda: run(source, parts)) == signal.SIGKILL
        done = [p.name for p in sorted(parts.iterdir()) if (p / pipeline.DONE).exists()]
        assert done == STAGES[: number - 1]
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "rehearse", lambda *_: None)
            kill_at(patch, 2)  # finishes this one and dies in the next
            status = in_child(lambda: run(source, parts))
        assert (parts / name / pipeline.DONE).exists()
        assert status == (signal.SIGKILL if number < len(STAGES) else 0)
    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in parts.glob("*/model.pt")}
    assert run(source, parts) == 0
    assert capsys.readouterr().out.count("finished before") == len(STAGES)
    assert {p: p.stat().st_mtime_ns for p in parts.glob("*/model.pt")} == before
    a, b = (load_checkpoint(folder / "model.pt") for folder in (whole, parts))
    assert same(a.model, b.model)
    steps = ["train", "distillation", "pruning", "pruning", "recovery", "quantization"]
    assert [entry["step"] for entry in b.history] == steps
    assert not list(parts.glob("*/fine_tuning_*"))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([STEPS[3], STEPS[0]], "step 2 .distillation. cannot work here: .* is a packed layer"),
        ([STEPS[3], STEPS[1]], "step 2 .pruning. cannot work here: .*already replaced"),
        ([STEPS[3], STEPS[2]], "step 2 .recovery. cannot work here: .*integer layers"),
        (
            [STEPS[0], {"method": "clustering"},
             {"method": "pruning", "pruning_type": "structured"}],
            "step 3 .pruning. cannot work here: .*structured pruning comes before",
        ),
        ([{**STEPS[0], "teacher": "missing.pt"}], "missing.pt: no such file"),
        ([{**STEPS[1], "fine_tune_epochs": 1}], "give fine_tune_epochs of at least 2, not 1"),
        ([{"method": "evaluation"}], "evaluation takes test_data"),
        ([{**STEPS[2], "fine_tune_data": "nowhere"}], "nowhere"),
    ],
)  # fmt: skip
def test_an_order_that_cannot_work_is_refused_before_training(
    steps, message, source, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(Learner, "train_step", lambda *_: pytest.fail("it trained"))
    assert run(source, tmp_path / "out", steps) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert re.search(message, errors[0])
    assert not (tmp_path / "out").exists()


def test_another_run_in_the_folder_is_left_alone(source, no_export, tmp_path, capsys):
    steps = [STEPS[3]]
    assert run(source, tmp_path / "out", steps) == 0
    before = (tmp_path / "out" / "model.pt").read_bytes()
    other = [{"method": "quantization", "precision": "fp16"}]
    assert run(source, tmp_path / "out", other) == 2
    assert "holds a run with another steps" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.pt").read_bytes() == before


def test_every_stage_is_measured_and_the_report_is_written(source, corpus, tmp_path, capsys):
    """The real export, on test data; an evaluation step on other data."""
    lines = (corpus / "dev.json").read_text().splitlines()
    for name, part in (("test.json", lines[:3]), ("more.json", lines[3:])):
        rows = [json.loads(line) for line in part]
        for row in rows:
            row["audio_filepath"] = str(corpus / row["audio_filepath"])
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [
        {"method": "quantization", "precision": "int8"},
        {"method": "evaluation", "test_data": str(tmp_path / "more.json")},
    ]
    flags = ["--test_data", str(tmp_path / "test.json"), "--target_size_reduction", "0.5"]
    flags += ["--target_latency_ms", "60000"]  # with a recipe nothing is mixed for it
    assert run(source, tmp_path / "out", steps, *flags) == 0
    stages = read_stages(tmp_path / "out")
    assert [s.name for s in stages] == ["0_source", "1_quantization", "2_evaluation"]
    assert stages[1].bytes < 0.6 * stages[0].bytes
    assert stages[2].bytes == stages[1].bytes
    assert stages[0].flops_per_second == stages[1].flops_per_second
    assert all(s.latency > 0 and s.peak_rss > 0 and s.cer >= 0 for s in stages)
    assert stages[2].test_data.endswith("more.json")
    report = json.loads((tmp_path / "out" / "final_report.json").read_text())
    assert [row["target"] for row in report["targets"]] == ["size_reduction", "latency"]
    assert report["targets"][1]["met"]
    assert (tmp_path / "out" / "final_report.png").stat().st_size
    assert Targets(size_reduction=0.5).size_reduction == 0.5


def test_pruning_in_steps_reaches_what_is_asked():
    config = recipes.make_step("pruning", {"sparsity": 0.3, "schedule": "linear", "steps": 3,
                                        "fine_tune_epochs": 7})  # fmt: skip
    parts = recipes.expand([config])
    assert [round(p.config.sparsity, 6) for p in parts] == [0.1, 0.2, 0.3]
    assert [p.tuning.fine_tune_epochs for p in parts] == [2, 2, 3]
    cubic = recipes.expand([recipes.make_step("pruning", {
        "sparsity": 0.5, "steps": 2, "pruning_type": "structured", "fine_tune_epochs": 2,
    })])  # fmt: skip
    gone = 1.0
    for part in cubic:
        gone *= 1 - part.config.sparsity
    assert gone == pytest.approx(0.5)
    assert cubic[0].config.sparsity == pytest.approx(0.5 * (1 - 0.5**3))
    for options, message in (
        ({"schedule": "linear"}, "linear needs steps"),
        ({"schedule": "one-shot", "steps": 2}, "prunes once"),
        ({"steps": 1}, "above 1"),
        ({"steps": 2, "size_ratio": 2.0}, "not with size_ratio"),
    ):
        with pytest.raises(ValueError, match=message):
            recipes.make_step("pruning", options)


@pytest.mark.parametrize("kind", ["unstructured", "structured"])
def test_pruned_in_steps_as_much_is_gone(kind):
    checkpoint = build(d_model=32, n_layers=2)
    step = recipes.make_step("pruning", {
        "sparsity": 0.5, "schedule": "linear", "steps": 2, "pruning_type": kind,
        "fine_tune_epochs": 2,
    })  # fmt: skip
    for part in recipes.expand([step]):
        untrained = core.Step(part.method, part.config)
        checkpoint = core.take(untrained, checkpoint, checkpoint)
    if kind == "structured":
        inside = [m.args["hidden"] for b in checkpoint.model.blocks for m in (b.ff1, b.ff2)]
        assert sum(inside) == 256  # of 512
    else:
        weights = pruning.prunable(checkpoint.model, pruning.Config())
        zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        assert zeros == pytest.approx(0.5, abs=0.002)


def test_a_recipe_trains_on_the_data_that_is_given(corpus, tmp_path, no_export, capsys):
    """The model that ships names none; a step that names its own keeps it."""
    checkpoint = build(corpus)
    checkpoint.data = {}
    save_checkpoint(tmp_path / "shipped.pt", checkpoint)
    own = str(write_corpus(tmp_path / "own", 1))
    steps = [STEPS[0], {"method": "recovery", "fine_tune_epochs": 1,
                        "fine_tune_data": own}, STEPS[3]]  # fmt: skip
    folder, flag = tmp_path / "out", ("--fine_tune_data", str(corpus))
    assert cli.main(arguments(tmp_path / "shipped.pt", folder, steps)) == 2
    assert "give --fine_tune_data" in capsys.readouterr().err
    assert cli.main(arguments(tmp_path / "shipped.pt", folder, steps, *flag)) == 0
    history = load_checkpoint(folder / "model.pt").history[-3:]
    named = [entry["config"].get("fine_tune_data", "") for entry in history]
    assert named == [str(corpus), own, ""]
    capsys.readouterr()
    assert cli.main(arguments(tmp_path / "shipped.pt", tmp_path / "b", [STEPS[3]], *flag)) == 2
    assert "no step of" in capsys.readouterr().err


def test_data_of_a_later_step_is_looked_at_before_an_earlier_trains(source, tmp_path, capsys):
    dev = write_corpus(tmp_path / "own", 1) / "dev.json"
    steps = [STEPS[0], {"method": "recovery", "fine_tune_epochs": 1, "fine_tune_data": str(dev)}]
    assert cli.main(arguments(source, tmp_path / "out", steps)) == 2
    assert "no split named train*" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
