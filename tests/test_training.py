"""The training loop: it learns, resumes to the bit, skips bad steps, and splits over processes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from asr.corpus.splits import load_splits
from asr.network.checkpoint import load_checkpoint, save_checkpoint
from asr.network.model import ConformerCTC
from asr.runtime.config import FeatureConfig
from asr.runtime.tokenizer import Tokenizer
from asr.training import learner
from asr.training.data import BatchDataset
from asr.training.epochs import Epochs
from asr.training.learner import Learner
from asr.training.optim import AveragedModel, learning_rate_at
from asr.training.start import start_from, zero_share
from asr.training.train import main, parse_args
from asr.training.train_config import TrainConfig
from asr.training.trainer import Trainer
from compress import calibration, core, recipes
from tests.corpus import write_corpus

ROOT = Path(__file__).parent.parent
SMALL = (
    "--d_model 16 --n_layers 2 --n_heads 2 --conv_kernel_size 7 --subsampling_channels 4 "
    "--alphabet abc --num_workers 0 --batch_size 4 --warmup_steps 5 --no-tensorboard --threads 1"
).split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def flags(corpus: Path, output: Path, *more: str) -> list[str]:
    return ["--data_dir", str(corpus), "--output_dir", str(output), *SMALL, *more]


def weights(folder: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / name).model.state_dict()


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_learns_a_toy_language(corpus, tmp_path, capsys):
    plain = "--dropout 0 --speed 0 --time_masks 0 --freq_masks 0 --warp 0 --precision float32"
    more = ["--epochs", "25", "--learning_rate", "0.01", *plain.split()]
    code = main(flags(corpus, tmp_path, *more))
    assert code == 0
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    dev = [entry["dev_cer"] for entry in log if "dev_cer" in entry]
    assert dev[0] > 0.9
    assert min(dev) < 0.35  # unseen combinations of letters
    assert min(entry["loss"] for entry in log if "loss" in entry) < 0.2
    assert "heard" in capsys.readouterr().out
    checkpoint = load_checkpoint(tmp_path / "model.pt")
    assert checkpoint.training is None
    assert checkpoint.data["train"] == str(corpus)
    assert checkpoint.history[-1]["dev_wer"] == min(e["dev_wer"] for e in log if "dev_wer" in e)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_resume_after_sigkill_is_bit_identical(corpus, tmp_path, precision):
    """Killed twice at arbitrary moments, the run ends with the weights of one never killed."""
    more = ["--epochs", "4", "--precision", precision, "--save_every", "2", "--accumulate", "2"]
    assert main(flags(corpus, tmp_path / "whole", *more)) == 0
    command = [sys.executable, "train.py", *flags(corpus, tmp_path / "killed", *more, "--resume")]
    for kill in range(2):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        state = tmp_path / "killed" / "last.pt"
        before = state.stat().st_mtime_ns if state.exists() else 0
        deadline = time.monotonic() + 90
        while process.poll() is None and time.monotonic() < deadline:
            if state.exists() and state.stat().st_mtime_ns != before:
                break
            time.sleep(0.01)
        time.sleep(0.05 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert main(flags(corpus, tmp_path / "killed", *more, "--resume")) == 0
    assert same_bits(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert same_bits(
        weights(tmp_path / "whole", "model.pt"), weights(tmp_path / "killed", "model.pt")
    )
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("whole", "killed")]
    steps = [[json.loads(x)["step"] for x in log] for log in logs]
    assert steps[0] == steps[1]


def test_interrupt_saves_and_resumes(corpus, tmp_path, monkeypatch):
    """Ctrl-C ends after the current step with exit code 130 and a state to go on from."""
    more = ["--epochs", "2", "--precision", "float32"]
    assert main(flags(corpus, tmp_path / "whole", *more)) == 0
    step = Trainer.train_step

    def interrupted(self, batches, progress):
        result = step(self, batches, progress)
        if self.learner.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    assert main(flags(corpus, tmp_path / "stopped", *more)) == 130
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "stopped" / "last.pt").training["batches_done"] == 3
    assert main(flags(corpus, tmp_path / "stopped", *more, "--resume")) == 0
    assert same_bits(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))


def test_not_finite_steps_are_skipped_and_counted(corpus, tmp_path, monkeypatch):
    plain = learner.ctc_loss
    calls = []

    def sometimes_nan(*args):
        calls.append(1)
        return plain(*args) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(learner, "ctc_loss", sometimes_nan)
    more = ["--epochs", "1", "--precision", "float32", "--log_every", "1"]
    assert main(flags(corpus, tmp_path, *more)) == 0
    assert len(calls) > 2
    assert all(torch.isfinite(x).all() for x in weights(tmp_path).values())
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["skipped"] == 1


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "--batch_seconds"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes"), "--batch_seconds"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--shm-size"),
    ],
)
def test_running_out_of_memory_keeps_the_state(
    corpus, tmp_path, monkeypatch, capsys, error, advice
):
    plain = Learner.train_step

    def short_of_memory(self, *args):
        if self.step == 2:
            raise error
        return plain(self, *args)

    more = ["--epochs", "1", "--precision", "float32"]
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "train_step", short_of_memory)
        assert main(flags(corpus, tmp_path, *more)) == 2
    said = capsys.readouterr().err.strip()
    assert advice in said
    assert "\n" not in said
    assert load_checkpoint(tmp_path / "last.pt").training["step"] == 2
    assert main([*flags(corpus, tmp_path, *more), "--batch_seconds", "3", "--resume"]) == 0
    assert "other batches than before: epoch 1 begins again" in capsys.readouterr().out


def test_devices_without_a_ctc_loss_are_refused(corpus, tmp_path, capsys):
    assert main(flags(corpus, tmp_path, "--device", "mps")) == 2
    assert "--device mps: not supported" in capsys.readouterr().err
    assert not tmp_path.joinpath("last.pt").exists()


def test_two_processes_give_the_loss_of_one(corpus, tmp_path):
    """torchrun with two processes against one with --accumulate 2: the same batches a step.

    Tolerance 1e-4: sums run in another order; dropout is off since each process draws its own.
    """
    more = ["--epochs", "1", "--precision", "float32", "--log_every", "1", "--dropout", "0"]
    assert main(flags(corpus, tmp_path / "one", *more, "--accumulate", "2")) == 0
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "train.py", *flags(corpus, tmp_path / "two", *more),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("best dev WER") == 1  # only the first process speaks
    losses = []
    for run in ("one", "two"):
        log = [json.loads(x) for x in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        losses.append([entry["loss"] for entry in log if "loss" in entry])
    assert len(losses[0]) > 2
    n = min(len(losses[0]), len(losses[1]))  # an odd last batch is repeated for two processes
    assert losses[0][: n - 1] == pytest.approx(losses[1][: n - 1], rel=1e-4)


def test_interrupt_of_two_processes_saves_a_state(corpus, tmp_path):
    more = ["--epochs", "500", "--precision", "float32", "--log_every", "2", "--seed", "3"]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "train.py", *flags(corpus, tmp_path, *more),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    state = tmp_path / "last.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    before = load_checkpoint(state).training["step"]
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    training = load_checkpoint(state).training
    assert training["step"] > before
    assert training["step"] % 2 == 0


def test_fine_tuning_starts_from_the_given_weights(corpus, tmp_path):
    more = ["--epochs", "1", "--precision", "float32"]
    assert main(flags(corpus, tmp_path / "first", *more)) == 0
    start = tmp_path / "first" / "model.pt"
    args = ["--data_dir", str(corpus), "--output_dir", str(tmp_path / "second"), "--epochs", "1",
            "--init_from", str(start), "--learning_rate", "1e-9", "--num_workers", "0",
            "--no-tensorboard", "--ema", "0", "--weight_decay", "0"]  # fmt: skip
    assert main(args) == 0
    old, new = weights(tmp_path / "first", "model.pt"), weights(tmp_path / "second", "model.pt")
    for name, value in old.items():
        if "running" not in name:
            torch.testing.assert_close(new[name], value, atol=1e-6, rtol=0)
    history = load_checkpoint(tmp_path / "second" / "model.pt").history
    assert [entry["step"] for entry in history] == ["train", "init", "train"]
    assert history[1]["sha256"] == hashlib.sha256(start.read_bytes()).hexdigest()


def test_fine_tuning_from_an_unfinished_run_keeps_its_history(corpus, tmp_path):
    assert main(flags(corpus, tmp_path / "first")) == 0
    checkpoint = start_from(str(tmp_path / "first" / "last.pt"))
    assert checkpoint.training is None
    assert [entry["step"] for entry in checkpoint.history] == ["train", "init"]
    assert checkpoint.history[0]["config"]["batch_size"] == 4


def test_a_packed_model_is_not_trained_and_a_pruned_one_is_filled_aloud(corpus, tmp_path, capsys):
    """Of every method that packs; a step could not move integers."""
    assert main(flags(corpus, tmp_path / "float", "--epochs", "1")) == 0
    made = tmp_path / "made.pt"
    args = ["--data_dir", str(corpus), "--output_dir", str(tmp_path / "run"), "--epochs", "1",
            "--init_from", str(made), "--num_workers", "0", "--no-tensorboard"]  # fmt: skip
    for method, options in (
        ("quantization", {"precision": "int8"}), ("quantization", {"precision": "int4"}),
        ("quantization", {"precision": "int2"}), ("quantization", {"precision": "ternary"}),
        ("clustering", {"num_clusters": 4}),
    ):  # fmt: skip
        checkpoint = load_checkpoint(tmp_path / "float" / "model.pt")
        save_checkpoint(made, core.run(checkpoint, [recipes.make_step(method, options)]))
        assert main(args) == 2
        error = capsys.readouterr().err
        assert "packed as integers" in error
        assert "float checkpoint that it was made of" in error
        assert not (tmp_path / "run").exists()
    checkpoint = load_checkpoint(tmp_path / "float" / "model.pt")
    save_checkpoint(made, core.run(checkpoint, [recipes.make_step("pruning", {"sparsity": 0.5})]))
    before = zero_share(load_checkpoint(made).model)
    assert main(args) == 0
    assert f"note: {before:.0%} of the weights in {made} are zero" in capsys.readouterr().out
    assert zero_share(load_checkpoint(tmp_path / "run" / "model.pt").model) < 0.01 < before
    assert start_from(tmp_path / "float" / "model.pt")
    assert "note:" not in capsys.readouterr().out


def test_recipes_are_found_by_name_and_their_paths_from_their_folder(tmp_path, monkeypatch, capsys):
    recipes = tmp_path / "experiments" / "recipes"
    recipes.mkdir(parents=True)
    (tmp_path / "start.pt").write_bytes(b"")
    contents = {"init_from": "../../start.pt", "data_dir": ["far", "../../"], "epochs": 3}
    (recipes / "mine.json").write_text(json.dumps(contents))
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "experiments/recipes/mine.json"):
        args = parse_args(["--config", name, "--output_dir", "x", "--epochs", "4"])
        assert Path(args.init_from).samefile(tmp_path / "start.pt")
        assert args.data_dir[0] == "far"
        assert Path(args.data_dir[1]).samefile(tmp_path)
        assert args.epochs == 4
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    shipped = parse_args(["--config", "an4_fine_tune", "--output_dir", "x", "--data_dir", "d"])
    assert Path(shipped.init_from).exists()  # a recipe of the repository
    assert main(["--config", "none_such", "--output_dir", "x"]) == 2
    error = capsys.readouterr().err
    assert "an4_fine_tune" in error
    assert error.count("\n") == 1


def test_several_folders_of_data_count_as_one(corpus, tmp_path):
    """The dev data of one is that of all; compression finds all of them again."""
    more = write_corpus(tmp_path / "more", per_text=1)
    (more / "dev.json").unlink()
    (more / "train.json").rename(more / "extra.json")  # alone in its folder, it trains
    places = [str(corpus), str(more)]
    args = flags(corpus, tmp_path / "run", "--epochs", "1")
    assert main([*args, "--data_dir", *places]) == 0
    checkpoint = load_checkpoint(tmp_path / "run" / "model.pt")
    assert checkpoint.data["train"] == places
    splits = load_splits(places)
    assert [len(splits.train), len(splits.dev)] == [27, 6]
    assert {u.audio_filepath for u in load_splits(corpus).train} < {
        u.audio_filepath for u in splits.train
    }
    assert calibration.speech(checkpoint, places) == splits.train
    assert calibration.speech(checkpoint, places, "dev") == splits.dev
    assert calibration.load(checkpoint).source == " ".join(places)
    assert load_splits([corpus, corpus]) == load_splits(corpus)


def test_bpe_and_config_file(corpus, tmp_path):
    config = tmp_path / "config.json"
    settings = {"tokenizer": "bpe", "vocab_size": 8, "epochs": 7, "sorted_epochs": 3}
    config.write_text(json.dumps(settings))
    more = ["--config", str(config), "--epochs", "1", "--sorted_epochs", "0"]
    args = flags(corpus, tmp_path / "run", *more)
    args.remove("--alphabet")
    args.remove("abc")
    assert main(args) == 0
    checkpoint = load_checkpoint(tmp_path / "run" / "model.pt")
    assert len(checkpoint.tokenizer) == 8
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("abc a")) == "abc a"
    used = checkpoint.history[-1]["config"]  # the command line wins, with 0 as well
    assert (used["epochs"], used["sorted_epochs"]) == (1, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": "10"}, "epochs '10' must be a whole number"),
        ({"noise": "0.1"}, "noise '0.1' must be a finite number"),
        ({"threads": True}, "threads True must be a whole number"),
        ({"tensorboard": 1}, "tensorboard 1 must be true or false"),
        ({"tokenizer": "BPE"}, "tokenizer 'BPE' is not one of char, bpe"),
    ],
)
def test_wrong_types_in_a_config_file_are_named(corpus, tmp_path, capsys, wrong, message):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(wrong))
    args = ["--data_dir", str(corpus), "--output_dir", str(tmp_path / "run")]
    assert main([*args, "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--epochs", "0"], "--epochs 0 must be above 0"),
        (["--data_dir", "nowhere"], "nowhere"),
        (["--alphabet", "xy"], "outside the alphabet"),
        (["--init_from", "no.pt"], "no.pt: no such file"),
        (["--d_model", "15"], "d_model 15"),
        (["--device", "tpu9"], "not a device"),
        (["--device", "cuda:7"], "--device cuda:7"),
        (["--threads", "-1"], "--threads -1 must not be below 0"),
        (["--grad_clip", "0"], "--grad_clip 0.0 must be above 0"),
        (["--vocab_size", "9"], "--vocab_size 9 is for --tokenizer bpe"),
        (["--tokenizer", "bpe"], "--alphabet is for --tokenizer char"),
    ],
)
def test_mistakes_give_one_line_and_no_folder(corpus, tmp_path, capsys, more, message):
    output = tmp_path / "run"
    assert main(flags(corpus, output, *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not output.exists()


def test_finished_run_is_not_overwritten(corpus, tmp_path, capsys):
    assert main(flags(corpus, tmp_path, "--epochs", "1")) == 0
    assert main(flags(corpus, tmp_path, "--epochs", "1")) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(flags(corpus, tmp_path, "--epochs", "1", "--learning_rate", "3", "--resume")) == 2
    assert "--learning_rate" in capsys.readouterr().err
    (tmp_path / "last.pt").unlink()
    model = (tmp_path / "model.pt").read_bytes()
    assert main(flags(corpus, tmp_path, "--epochs", "1")) == 2
    assert "model.pt is there already" in capsys.readouterr().err
    assert (tmp_path / "model.pt").read_bytes() == model


@pytest.mark.parametrize("start", ["--resume", "--init_from"])
def test_flags_cannot_change_a_model_that_is_there(corpus, tmp_path, capsys, start):
    assert main(flags(corpus, tmp_path / "a", "--epochs", "1")) == 0
    more = ["--resume"] if start == "--resume" else [start, str(tmp_path / "a" / "model.pt")]
    output = tmp_path / ("a" if start == "--resume" else "b")
    for name, value in (("d_model", "32"), ("dropout", "0.3"), ("tokenizer", "bpe"),
                        ("alphabet", "abcd"), ("preset", "tiny")):  # fmt: skip
        assert main(flags(corpus, output, "--epochs", "1", *more, f"--{name}", value)) == 2
        error = capsys.readouterr().err
        assert "the model that training starts from has" in error
        assert f"--{name} {value}" in error


def test_flags_that_say_what_is_there_are_no_mistake(corpus, tmp_path):
    first = ("--preset", "tiny", "--d_model", "16", "--n_layers", "3", "--epochs", "1")
    assert main(flags(corpus, tmp_path / "a", *first)) == 0
    assert main(flags(corpus, tmp_path / "a", *first, "--resume")) == 0
    checkpoint = load_checkpoint(tmp_path / "a" / "model.pt")
    checkpoint.model = ConformerCTC(replace(checkpoint.model.config, n_layers=5))
    save_checkpoint(tmp_path / "other.pt", checkpoint)  # its inner output is after block 1
    start = ("--init_from", str(tmp_path / "other.pt"), "--epochs", "1")
    assert main(flags(corpus, tmp_path / "b", *start, "--n_layers", "5")) == 0


def test_a_run_goes_on_only_with_its_own_data_and_processes(corpus, tmp_path, monkeypatch, capsys):
    assert main(flags(corpus, tmp_path / "run", "--epochs", "1")) == 0
    other = write_corpus(tmp_path / "other", per_text=1)
    assert main(flags(other, tmp_path / "run", "--epochs", "1", "--resume")) == 2
    assert "training data is not that of this run" in capsys.readouterr().err
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    state.training["processes"] = 2
    save_checkpoint(tmp_path / "run" / "last.pt", state)
    assert main(flags(corpus, tmp_path / "run", "--epochs", "1", "--resume")) == 2
    assert "this run has 2 processes, not 1" in capsys.readouterr().err


def test_a_broken_recording_is_named_and_what_was_learnt_is_kept(tmp_path, capsys):
    """In a process of the loader; mended, the run goes on."""
    corpus = write_corpus(tmp_path / "corpus")
    more = ["--num_workers", "1", "--sorted_epochs", "0", "--epochs", "1"]
    broken = sorted(corpus.glob("train-*.wav"))[5]
    sound = broken.read_bytes()
    broken.write_text("no sound")
    assert main(flags(corpus, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {broken}: " in error
    assert "Traceback" not in error
    broken.write_bytes(sound)
    assert main(flags(corpus, tmp_path / "run", *more, "--resume")) == 0
    assert (tmp_path / "run" / "model.pt").exists()
    broken.unlink()
    assert main(flags(corpus, tmp_path / "again", *more)) == 2
    assert f"{broken}: no such recording (1 of" in capsys.readouterr().err


def test_a_broken_dev_recording_costs_no_epoch(tmp_path, capsys, monkeypatch):
    """Mended, the trained epoch is measured and its model kept, without training it again."""
    corpus = write_corpus(tmp_path / "corpus")
    broken = min(corpus.glob("dev-*.wav"))
    sound = broken.read_bytes()
    broken.write_text("no sound")
    assert main(flags(corpus, tmp_path / "run", "--epochs", "1")) == 2
    assert f"error: {broken}: " in capsys.readouterr().err
    broken.write_bytes(sound)
    monkeypatch.setattr(Trainer, "train_step", None)
    more = ["--epochs", "1", "--num_workers", "1", "--resume"]
    assert main(flags(corpus, tmp_path / "run", *more)) == 0
    assert load_checkpoint(tmp_path / "run" / "model.pt").history[-1]["epoch"] == 1


def test_every_process_has_as_many_batches(corpus):
    """Also where there are fewer batches than processes."""
    utterances = load_splits(corpus).train[:3]
    config = TrainConfig(batch_size=16, threads=1)
    dataset = BatchDataset(utterances, Tokenizer.characters("abc"), FeatureConfig())
    shares = [len(Epochs(dataset, config, rank, 4).keys(0)) for rank in range(4)]
    assert shares == [1, 1, 1, 1]


def test_output_folder_not_writable(corpus, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main(flags(corpus, blocked / "run", "--epochs", "1")) == 2
    assert str(blocked) in capsys.readouterr().err


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a compiler")
def test_compiled_parts_take_new_lengths_without_a_new_graph(corpus, tmp_path):
    plain = "--dropout 0 --epochs 1 --batch_size 2 --precision float32 --log_every 1".split()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert main(flags(corpus, tmp_path / "compiled", *plain, "--compile")) == 0
    # one graph for each of feed-forward and attention, and one more each for a batch of one
    assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert main(flags(corpus, tmp_path / "eager", *plain)) == 0
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / run / "log.jsonl").open()]
        for run in ("compiled", "eager")
    ]
    assert len(losses[0]) == 10  # nine steps and the dev set
    assert losses[0][:-1] == pytest.approx(losses[1][:-1], rel=1e-3)


def test_schedules():
    def rate(step, progress, name):
        return learning_rate_at(step, progress, 1.0, name, 10)

    assert rate(0, 0, "cosine") == pytest.approx(0.1)
    assert rate(9, 0, "cosine") == pytest.approx(1.0)
    assert rate(99, 1.0, "cosine") == pytest.approx(0.01)
    assert rate(39, 0.5, "noam") == pytest.approx(0.5)
    assert rate(500, 0.9, "constant") == 1.0


def test_average_follows_the_model():
    model = torch.nn.Linear(2, 2)
    average = AveragedModel(model, decay=0.9)
    with torch.no_grad():
        model.weight += 1.0
    for step in range(200):
        average.update(model, step)
    torch.testing.assert_close(average.model.weight, model.weight, atol=1e-5, rtol=0)


def test_config_is_checked():
    with pytest.raises(ValueError, match="--ema"):
        TrainConfig(ema=1.5)
    with pytest.raises(ValueError, match="--scheduler"):
        TrainConfig(scheduler="linear")
