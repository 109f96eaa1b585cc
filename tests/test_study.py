"""Studies: rows run once, stopped ones go on, differences are pooled over seeds."""

import json

import pytest

from asr.corpus.manifest import read_manifest
from experiments.studies import divide, run_study


def result(errors):
    utterances = [
        {"id": str(i), "duration": 1.0, "words": 10, "word_errors": e, "characters": 20,
         "character_errors": e, "digest": str(e)}
        for i, e in enumerate(errors)
    ]  # fmt: skip
    wer = sum(errors) / (10 * len(errors))
    return {"wer": wer, "bytes": 10, "params": 5, "utterances": utterances}


@pytest.fixture
def plan(tmp_path):
    rows = [
        {"name": n, "commands": [f"{n} {{seed}} {{data}}"], "model": "{out}/m.pt"} for n in "ab"
    ]
    contents = {"rows": rows, "seeds": [0, 1], "test_data": "t", "values": {"data": "d"},
                "once": ["teach {base}"], "against": {"a": "b"}}  # fmt: skip
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(contents))
    return path


def test_it_runs_what_is_missing_and_compares(plan, tmp_path, monkeypatch, capsys):
    ran = []
    errors = {"a": [1, 0, 2, 1], "b": [4, 3, 5, 4]}

    def command(text, log):
        ran.append(text.split()[0])
        if text.startswith("b 1"):
            raise ValueError("stopped")
        if text.startswith("evaluate.py"):
            target = tmp_path / "out" / text.split("--output_file ")[1].split("/")[-1]
            target.write_text(json.dumps(result(errors[target.name[0]])))

    monkeypatch.setattr(run_study, "run_command", command)
    (tmp_path / "out").mkdir()
    flags = [str(plan), "--output_dir", str(tmp_path / "out")]
    assert run_study.main(flags) == 2
    assert ran == ["teach", "a", "evaluate.py", "b", "evaluate.py", "a", "evaluate.py", "b"]
    ran.clear()
    assert run_study.main(flags) == 2
    assert ran == ["b"]  # the one that was stopped, nothing else
    assert run_study.main([*flags, "--summary"]) == 0
    assert "missing: b_1" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "study.json").read_text())
    assert found["missing"] == ["b_1"]
    (pair,) = found["pairs"]
    assert pair["seeds"] == [0]
    assert pair["delta"] == pytest.approx(-0.3)
    assert pair["interval"] == pytest.approx([-0.3, -0.3])
    assert found["rows"][0]["wer"] == {"0": 0.1, "1": 0.1}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"against": {"a": "x"}}, "no row is named 'x'"), ({"rows": [{"name": "a"}]}, "a row needs")],
)
def test_bad_plans(plan, change, message, tmp_path, capsys):
    plan.write_text(json.dumps(json.loads(plan.read_text()) | change))
    assert run_study.main([str(plan), "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_the_shipped_plans_and_recipes_are_read():
    from compress import recipes

    folder = run_study.ROOT / "experiments"
    for path in sorted((folder / "studies").glob("*.json")):
        plan = run_study.read_plan(str(path))
        assert len({row["name"] for row in plan["rows"]}) == len(plan["rows"])
    for name in ("distill_prune_quantize", "prune_int8", "distill_fp16", "distill_int8",
                 "factorize_int8", "prune_cluster_entropy"):  # fmt: skip
        assert recipes.expand(recipes.read_recipe(str(folder / "recipes" / f"{name}.json")))


def test_a_manifest_is_divided_in_two(tmp_path, capsys):
    lines = [{"audio_filepath": f"{i}.wav", "duration": 1.0, "text": "a"} for i in range(10)]
    whole = tmp_path / "train.json"
    whole.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [str(whole), "--output_dir", str(tmp_path / "few")]
    assert divide.main([*flags, "--labelled", "3"]) == 0
    parts = [
        {u.id for u in read_manifest(tmp_path / "few" / f"{name}.json")}
        for name in ("train", "others")
    ]
    assert (len(parts[0]), len(parts[1]), len(parts[0] | parts[1])) == (3, 7, 10)
    assert divide.main([*flags, "--labelled", "10"]) == 2
    assert "must lie in 1..9" in capsys.readouterr().err
