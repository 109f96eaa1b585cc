"""Flags from dataclasses, config files, one clear line for a mistake; the command compress.py."""

import argparse
import errno
import json
import os
import re
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
import torch
from torch import nn

from asr.measure import evaluation
from asr.network.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from asr.runtime import recognizer
from asr.runtime.cli import (
    Parser,
    add_flags,
    describe,
    from_flags,
    guarded,
    int_list,
    read_config_file,
    read_structured,
    yes_no,
)
from asr.runtime.tokenizer import Tokenizer
from compress import cli, core, finetuning, methods, report, run
from tests.conftest import build_tiny_model
from tests.corpus import write_corpus

ROOT = Path(__file__).resolve().parents[1]
RECIPE = {"steps": [{"method": "pruning", "sparsity": 0.5}, {"method": "quantization"}]}


@dataclass(frozen=True)
class Options:
    rate: float = field(default=0.5, metadata={"help": "how fast"})
    steps: int = 3
    mode: str = field(default="fast", metadata={"choices": ("fast", "slow")})
    compile: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--steps {self.steps} must be above 0")


def parse(*argv: str) -> argparse.Namespace:
    parser = Parser()
    add_flags(parser, Options)
    return parser.parse_args(argv)


def test_no_flag_is_the_default():
    assert from_flags(Options, parse()) == Options()


def test_help_shows_what_must_be_given_before_what_may():
    parser = Parser("Does 100 % of it.\n\n    it.py A", prog="it.py")
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--rate", help="speed")
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_output_path("JSON")
    text = parser.format_help()
    assert text.startswith("Does 100 % of it.\n\n    it.py A\n\nusage: ")
    assert "usage: it.py --model_path MODEL_PATH FILE ... [options]\n" in text
    assert "--output_file" not in text


def test_files_to_write_are_taken_by_both_names():
    parser = Parser()
    parser.add_output_path("JSON")
    assert parser.parse_args([]).output_path is None
    for name in ("--output_path", "--output_file"):
        assert parser.parse_args([name, "r.json"]).output_path == "r.json"


def test_flags_win_over_the_file_and_the_file_over_defaults():
    args = parse("--steps", "7", "--no-compile")
    file = {"steps": 5, "rate": 0.25, "compile": True, "elsewhere": 1}
    assert from_flags(Options, args, file) == Options(rate=0.25, steps=7, compile=False)


def test_flags_have_types_choices_and_checks():
    assert from_flags(Options, parse("--rate", "1e-3", "--compile")) == Options(1e-3, compile=True)
    for wrong in (["--steps", "x"], ["--mode", "odd"], ["--rate"], ["--rate", "nan"]):
        with pytest.raises(ValueError, match=f"argument {wrong[0]}: .*; --help lists"):
            parse(*wrong)
    with pytest.raises(ValueError, match="--steps 0 must be above 0"):
        from_flags(Options, parse("--steps", "0"))


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("two\n  lines"), 2, "error: two lines"),
        (ValueError(), 2, "error: ValueError"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.pt"), 2,
         "error: a.pt: No space left on device"),
        (OSError("plain"), 2, "error: plain"),
        (ValueError("Caught AudioError in a process.\nOriginal Traceback (most recent call last):\n"
                    "  File x\nasr.audio.AudioError: a.wav: not audio\n"), 2,
         "error: a.wav: not audio"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_a_code(error, code, line, capsys):
    def command():
        raise error

    assert guarded(command) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == line + "\n"


def test_help_shows_defaults_but_not_those_that_mean_nothing_given():
    @dataclass(frozen=True)
    class Rank:
        rank: int = field(default=0, metadata={"help": "50 % of it", "above": 0})

    parser = argparse.ArgumentParser()
    add_flags(parser, Options)
    add_flags(parser, Rank)
    text = parser.format_help()
    assert "how fast (default: 0.5)" in text
    assert "50 % of it\n" in text


def test_our_own_errors_keep_their_traceback():
    def command():
        raise AssertionError("impossible")

    with pytest.raises(AssertionError):
        guarded(command)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_exit_codes(returned, code):
    assert guarded(lambda: returned) == code


def test_describe_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No such file") as caught:
        open(tmp_path / "absent")  # noqa: SIM115
    assert describe(caught.value) == f"{tmp_path}/absent: No such file or directory"


def test_config_files(tmp_path):
    json_file, toml_file = tmp_path / "a.json", tmp_path / "a.toml"
    json_file.write_text('{"steps": 5, "rate": 0.1}')
    toml_file.write_text("steps = 5\nrate = 0.1\n")
    assert read_config_file(str(json_file)) == {"steps": 5, "rate": 0.1}
    assert read_config_file(str(toml_file)) == {"steps": 5, "rate": 0.1}


@pytest.mark.parametrize("name", ["broken.json", "broken.toml"])
def test_a_broken_file_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_text("{steps: = 5")
    with pytest.raises(ValueError, match=f"{name}: not a JSON or TOML file"):
        read_structured(str(path))


def test_a_config_file_is_an_object(tmp_path):
    path = tmp_path / "list.json"
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="expected an object"):
        read_config_file(str(path))


@pytest.mark.parametrize(("text", "expected"), [("", ()), ("3", (3,)), ("2, 4,", (2, 4))])
def test_int_list(text, expected):
    assert int_list(text) == expected


def test_yes_no():
    assert (yes_no("True"), yes_no("0")) == (True, False)
    with pytest.raises(ValueError, match="neither"):
        yes_no("yess")


# compress.py


def tiny():
    return Checkpoint(build_tiny_model(), Tokenizer.characters(), data={"train": "nowhere"})


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "baseline" / "model.pt"
    checkpoint = tiny()
    checkpoint.training = {"optimizer": torch.randn(100_000)}
    save_checkpoint(path, checkpoint)
    return path


def arguments(source, output, *rest):
    return ["--model_path", str(source), "--output_dir", str(output), *rest]


def test_command_writes_model_and_report(source, tmp_path, capsys):
    output = tmp_path / "out"
    flags = ("--method", "quantization", "--precision", "int8", "--exclude", "head")
    assert cli.main(arguments(source, output, *flags)) == 0
    assert sorted(p.name for p in output.iterdir()) == ["compression.json", "model.pt"]
    result = load_checkpoint(output / "model.pt")
    assert result.training is None
    assert result.data == {"train": "nowhere"}
    assert type(result.model.head) is nn.Linear
    written = json.loads((output / "compression.json").read_text())
    assert written["command"].startswith("python compress.py --model_path")
    assert written["history"] == result.history
    assert written["bytes_after"] == pytest.approx(os.path.getsize(output / "model.pt"), abs=200)
    plain = report.file_bytes(tiny())  # without the resume state
    assert written["bytes_before"] == pytest.approx(plain, abs=200)
    assert written["parameters"] == sum(p.numel() for p in tiny().model.parameters())
    rows = {row["name"]: row for row in written["layers"]}
    assert rows["head"]["kept"] == "not selected by include and exclude"
    assert rows["blocks.0.ff1.up"]["after"] == "Int8Linear"
    printed = capsys.readouterr().out
    assert "Linear -> Int8Linear" in printed
    assert "as large as before: head: not selected" in printed
    capsys.readouterr()
    assert cli.main(arguments(source, output, *flags)) == 0  # its own result may be replaced
    assert capsys.readouterr().out.startswith(f"{output / 'model.pt'}: is there from an earlier")


@pytest.mark.parametrize(
    ("flags", "unmatched"),
    [
        (["--method", "quantization", "--exclude", "blocks.0,head"], ["--exclude 'blocks.0'"]),
        (["--method", "clustering", "--include", "*.ff1.*, *.up,*ff3*"], ["--include '*ff3*'"]),
        (["--method", "pruning", "--pruning_type", "structured", "--exclude", "blocks.0.ff1,*.up"],
         []),
        (["--recipe", "r.json"], ["--exclude 'heads'"]),
    ],
)  # fmt: skip
def test_a_pattern_without_effect_is_said(source, flags, unmatched, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    low_rank = {"method": "factorization", "rank": 4, "exclude": "head"}
    second = {"method": "quantization", "include": "*.up.down,head", "exclude": "heads"}
    (tmp_path / "r.json").write_text(json.dumps([low_rank, second]))
    assert cli.main(arguments(source, tmp_path / "out", *flags, "--dry_run")) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert [line[6:].partition(" fits no layer")[0] for line in notes] == unmatched


def test_recipe_and_dry_run(source, tmp_path, capsys):
    recipe = tmp_path / "r.json"
    recipe.write_text(json.dumps(RECIPE))
    output = tmp_path / "out"
    assert cli.main(arguments(source, output, "--recipe", str(recipe), "--dry_run")) == 0
    assert not output.exists()
    dry = capsys.readouterr().out
    assert re.search(r"blocks.0.ff1.up +\d", dry)
    assert cli.main(arguments(source, output, "--recipe", str(recipe))) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("file")]
    assert table[0] in dry  # the prediction is what came out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "gzip"], "invalid choice: 'gzip'"),
        (["--method", "clustering", "--num_clusters", "1"], "num_clusters 1"),
        (["--method", "clustering", "--num_clusters", "x"], "invalid int value"),
        (["--method", "clustering", "--rank", "3"], "unknown option 'rank' of clustering"),
        (["--method", "clustering", "--ranks", "3"], "--ranks"),
        (["--method", "pruning", "--sparsity", "1.5"], "sparsity 1.5"),
        (["--method", "factorization", "--rank", "9999"], "largest useful rank"),
        (["--method", "quantization", "--include", "*.ff9.*"], "'*.ff9.*'"),
        (["--method", "quantization", "--test_data", "missing"], "missing"),
        (["--method", "quantization", "--calibration_data", "missing"], "missing"),
        (["--method", "quantization", "--calibration_data", "empty"], "empty"),
        (["--method", "pruning", "--fine_tune_epochs", "1"], "nowhere"),
        (["--method", "pruning", "--distill_weight", "0.1"], "give fine_tune_epochs above 0"),
        (["--method", "pruning", "--fine_tune_data", "missing"], "give fine_tune_epochs above 0"),
        (["--method", "factorization", "--rank", "0"], "rank 0 is out of range"),
        (["--method", "quantization", "--dev_data", "x"], "--dev_data goes with"),
        (["--method", "pruning", "--sparsity", "0.3", "--size_ratio", "2"], "give either"),
        (["--method", "quantization", "--threads", "-1"], "--threads -1"),
        (["--recipe", "missing.json"], "missing.json"),
        (["--recipe", "r.json", "--method", "pruning"], "give either --method, --recipe"),
        (["--recipe", "r.json", "--rank", "3"], "--rank goes "),
        ([], "give either --method, --recipe"),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_bad_input(flags, message, existing, source, tmp_path, capsys, monkeypatch):
    """One line, exit 2, and the folder as it was."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    output = tmp_path / "out"
    if existing:
        output.mkdir()
        (output / "note").write_text("mine")
    assert cli.main(arguments(source, output, *flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert [p.name for p in output.iterdir()] == ["note"] if existing else not output.exists()


def test_what_is_not_overwritten(source, tmp_path, capsys):
    flags = ("--method", "quantization")
    before = source.read_bytes()
    assert cli.main(arguments(source, source.parent, *flags)) == 2
    assert "is the model to compress" in capsys.readouterr().err
    other = tmp_path / "other" / "model.pt"
    save_checkpoint(other, tiny())
    assert cli.main(arguments(source, other.parent, *flags)) == 2
    assert "not made by compress.py" in capsys.readouterr().err
    assert cli.main(arguments(source, source, *flags)) == 2
    assert "not a folder" in capsys.readouterr().err
    assert cli.main(arguments(tmp_path / "none.pt", tmp_path / "out", *flags)) == 2
    assert source.read_bytes() == before


def test_command_with_speech(tiny_onnx, tmp_path, capsys, monkeypatch):
    """Calibration on the training data that the checkpoint names; accuracy before and after."""
    corpus = write_corpus(tmp_path / "corpus")
    source, output = tmp_path / "baseline" / "model.pt", tmp_path / "out"
    checkpoint = tiny()
    checkpoint.data = {"train": str(corpus)}
    save_checkpoint(source, checkpoint)
    flags = ("--method", "quantization", "--precision", "int4", "--activation_aware")
    rest = ("--test_data", str(corpus / "dev.json"))
    export = iter([lambda _, path: shutil.copy(tiny_onnx, path), run.to_onnx])  # tracing is slow
    monkeypatch.setattr(run, "to_onnx", lambda *what: next(export)(*what))
    assert cli.main(arguments(source, output, *flags, *rest)) == 0
    written = json.loads((output / "compression.json").read_text())
    assert written["evaluation"].keys() == {"before", "after", "paired"}
    assert written["evaluation"]["after"]["latency_p50"] > 0
    out = capsys.readouterr().out
    assert re.search(r"after +WER \d.*\(\.onnx, .*exported in \d+ s, measured in \d+ s\)", out)
    deployed = written["evaluation"]["after"]["bytes"], written["evaluation"]["before"]["bytes"]
    assert 0.15 < deployed[0] / deployed[1] < 0.6, "the files of integers and of floats"


def test_each_file_is_measured_once_and_by_one_thread(source, tmp_path, monkeypatch):
    """What is printed once is measured once: one timed pass a file, with --threads for the rest."""
    corpus = write_corpus(tmp_path / "corpus", per_text=1)
    timed, loaded = [], []
    speed = {"latency_p50": 1.0, "latency_p95": 1.0, "rtf": 1.0, "peak_rss": 1.0}

    def measure(path, threads, audio, durations, beam=None):
        timed.append((Path(path).suffix, threads))
        return speed | {"threads": threads}

    def load(path, threads, beam=None, **more):
        loaded.append((Path(path).suffix, threads))
        return recognizer.load(source, **more)

    monkeypatch.setattr(evaluation, "measure", measure)
    monkeypatch.setattr(evaluation, "load", load)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: loaded.append(("torch", n)))
    monkeypatch.setattr(run, "to_onnx", lambda checkpoint, path: path.write_bytes(b"stub"))
    flags = ("--method", "quantization", "--threads", "2", "--test_data", str(corpus / "dev.json"))
    assert cli.main(arguments(source, tmp_path / "out", *flags)) == 0
    assert timed == [(".onnx", 1)] * 2
    assert loaded == [("torch", 2), (".onnx", 2), (".onnx", 2)]


@pytest.fixture
def with_speech(tmp_path):
    """A checkpoint that names its training data, and the command line that fine-tunes it."""
    corpus = write_corpus(tmp_path / "corpus")
    source = tmp_path / "baseline" / "model.pt"
    model = build_tiny_model(vocab_size=5, d_model=16, n_layers=1)
    settings = {"batch_size": 8, "num_workers": 0, "precision": "float32"}
    checkpoint = Checkpoint(
        model, Tokenizer.characters("abc"), data={"train": str(corpus)},
        history=[{"step": "train", "config": settings}],
    )  # fmt: skip
    save_checkpoint(source, checkpoint)
    flags = (
        "--method",
        "pruning",
        "--fine_tune_epochs",
        "1",
        "--test_data",
        str(corpus / "dev.json"),
    )
    return arguments(source, tmp_path / "out", *flags)


def test_bad_test_data_is_found_before_the_work(with_speech, tmp_path, capsys, monkeypatch):
    (tmp_path / "corpus" / "dev-0.wav").write_text("no sound")
    monkeypatch.setattr(core, "run", None)
    assert cli.main(with_speech) == 2
    assert "dev-0.wav" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_kill_while_measuring_loses_nothing(with_speech, tmp_path, monkeypatch):
    """The model is whole and our own; the same command goes on without another fine-tuning."""
    output = tmp_path / "out"
    keys = ("wer", "cer", "bytes", "latency_p50", "rtf", "peak_rss", "words")
    rates = dict.fromkeys(keys, 0.5)

    def killed(label, *_):
        if label == "after":
            raise KeyboardInterrupt
        return rates

    monkeypatch.setattr(run, "measure_exported", killed)
    assert cli.main(with_speech) == 130
    written = json.loads((output / "compression.json").read_text())
    assert written["bytes_after"] > 0
    assert "evaluation" not in written
    model = (output / "model.pt").read_bytes()
    monkeypatch.setattr(run, "measure_exported", lambda *_: rates)
    monkeypatch.setattr(run, "compare", lambda *results: {})
    monkeypatch.setattr(finetuning.FineTuner, "train_step", None)
    assert cli.main(with_speech) == 0
    assert (output / "model.pt").read_bytes() == model
    assert "evaluation" in json.loads((output / "compression.json").read_text())
    assert sorted(p.name for p in output.iterdir()) == ["compression.json", "model.pt"]


def test_a_full_disk_leaves_no_model_without_its_report(source, tmp_path, capsys, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(run, "write_atomically", full)
    assert cli.main(arguments(source, tmp_path / "out", "--method", "quantization")) == 2
    assert "compression.json: No space left" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_flags_of_several_methods_say_whose_they_are(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    shared = text[text.index("several methods:") : text.index(" clustering: Weights")]
    assert "--include INCLUDE clustering, factorization, pruning, quantization: pat" in shared
    assert re.search(r"--size_ratio SIZE_RATIO factorization: .*; pruning: ", shared)
    assert re.search(r"activation_aware clustering: .*; factorization: .*; quantization: ", shared)
    assert text.count(" --activation_aware, ") == 1


def test_help_has_every_option_of_every_method(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{f.name}" in text for m in methods().values() for f in fields(m.Config))
