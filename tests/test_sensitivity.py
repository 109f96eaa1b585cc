"""The scan and what is chosen from it."""

import copy
import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from asr.common.metrics import error_rates
from asr.network.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from asr.network.model import ConformerCTC
from asr.runtime.config import ModelConfig
from asr.runtime.recognizer import load
from asr.runtime.tokenizer import Tokenizer
from asr.training.data import BatchDataset
from asr.training.dev import transcribe_alone
from compress import calibration, cli, core, mixing, recipes, sensitivity, settings
from compress.factorization import method as factorization
from compress.report import file_bytes
from tests.corpus import write_corpus

SCRIPT = Path(__file__).parents[1] / "scripts" / "sensitivity.py"
INT4, TERNARY = settings.INT4, settings.TERNARY
STRUCTURED = "pruning:pruning_type=structured,sparsity=0.5"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def checkpoint(corpus):
    torch.manual_seed(0)
    model = ConformerCTC(
        ModelConfig(
            vocab_size=5, d_model=32, n_layers=2, n_heads=2, conv_kernel_size=7,
            subsampling_channels=8,
        )
    ).eval()  # fmt: skip
    return Checkpoint(model, Tokenizer.characters("abc"), data={"train": str(corpus)})


@pytest.fixture(scope="module")
def speech(checkpoint):
    return calibration.load(checkpoint)


@pytest.fixture(scope="module")
def found(checkpoint, speech):
    return sensitivity.scan(checkpoint, settings.SETTINGS, speech)


def test_every_layer_is_measured_and_the_model_left_alone(checkpoint, found, speech):
    names = [n for n, m in checkpoint.model.named_modules() if type(m) in sensitivity.KINDS]
    assert [row["name"] for row in found["layers"]] == names
    row = next(r for r in found["layers"] if r["name"] == "blocks.0.ff1.up")
    int8, int4, int2, ternary = (row["settings"][text] for text in settings.SETTINGS)
    assert row["bytes"] == 4 * (32 * 128 + 128)
    assert row["bytes"] > int8["bytes"] > int4["bytes"] > int2["bytes"] > ternary["bytes"]
    assert 0 < int8["distance"] < int4["distance"] < min(int2["distance"], ternary["distance"])
    totals = [
        sum(row["settings"][text]["distance"] for row in found["layers"] if row["settings"])
        for text in settings.SETTINGS
    ]  # a single layer of so small a model may err less with fewer bits
    assert totals == sorted(totals)
    assert int8["wer"] is None
    json.dumps(found)


def test_the_distance_is_that_of_the_layer_alone(checkpoint, found, speech):
    changed = core.run(
        copy.deepcopy(checkpoint),
        [recipes.make_step("quantization", {"precision": "ternary", "ends": "same",
                                         "include": "blocks.1.conv.up"})],
    )  # fmt: skip
    expected = 0.0
    frames = 0
    with torch.no_grad():
        for batch in speech.batches:
            a = checkpoint.model(batch.features, batch.feature_lengths)
            b = changed.model(batch.features, batch.feature_lengths)
            for i, n in enumerate(a.lengths.tolist()):
                p, q = a.log_probs[i, :n], b.log_probs[i, :n]
                expected += float(nn.functional.kl_div(q, p, log_target=True, reduction="sum"))
                frames += n
    row = next(r for r in found["layers"] if r["name"] == "blocks.1.conv.up")
    assert row["settings"][TERNARY]["distance"] == pytest.approx(expected / frames, rel=1e-3)


def test_modules_are_scanned_together(checkpoint, speech, corpus):
    dev = calibration.speech(checkpoint, str(corpus), "dev")
    found = sensitivity.scan(checkpoint, [INT4], speech, dev, by="module")
    names = [row["name"] for row in found["layers"]]
    assert names[:4] == ["subsampling", "blocks.0.ff1", "blocks.0.attn", "blocks.0.conv"]
    assert found["layers"][1]["layers"] == ["blocks.0.ff1.up", "blocks.0.ff1.down"]
    assert found["wer"] >= 0
    assert all(row["settings"][INT4]["wer"] >= 0 for row in found["layers"])


def test_settings_that_do_not_shrink_a_layer_are_left_out(checkpoint, speech):
    found = sensitivity.scan(checkpoint, ["factorization:rank=20"], speech)
    with_it = {row["name"] for row in found["layers"] if row["settings"]}
    assert "blocks.0.ff1.up" in with_it
    assert "blocks.0.attn.query" not in with_it
    with pytest.raises(ValueError, match="none of the settings makes a layer smaller"):
        sensitivity.scan(checkpoint, ["factorization:rank=500"], speech)


@pytest.mark.parametrize("target", [30_000, 45_000, 80_000])
def test_the_mix_fits_and_uses_what_it_may(checkpoint, found, target):
    def size(steps):
        return file_bytes(core.run(copy.deepcopy(checkpoint), steps))

    steps = mixing.fit_file(found, target, size)
    assert 0.85 * target < size(steps) <= target
    layers = [name for step in steps for name in step.config.include.split(",")]
    assert len(layers) == len(set(layers))


def test_the_mix_spares_the_layers_that_cost_most(found):
    found = copy.deepcopy(found)
    row = next(r for r in found["layers"] if r["name"] == "blocks.0.ff1.up")
    for option in row["settings"].values():
        option["distance"] = 100.0
    steps = mixing.fit(found, 0.3 * found["bytes"])
    assert not any("blocks.0.ff1.up" in step.config.include.split(",") for step in steps)


def test_out_of_reach(checkpoint, found):
    """The target as it was given, and what file is possible: the next try with that succeeds."""

    def size(steps):
        return file_bytes(core.run(copy.deepcopy(checkpoint), steps))

    message = r"0\.0213 MB is out of reach of .*ternary.* has (\d+),(\d+) bytes, 0\.\d{6} MB"
    with pytest.raises(ValueError, match=message) as caught:
        mixing.fit_file(found, 21_300, size)
    least = int("".join(re.search(message, str(caught.value)).groups()))
    assert size(mixing.fit_file(found, least, size)) == least
    with pytest.raises(ValueError, match="out of reach"):
        mixing.fit_file(found, least - 1, size)


def test_dynamic_int8_is_measured_one_utterance_at_a_time(
    checkpoint, found, corpus, tmp_path, monkeypatch
):
    """As the recogniser does: neighbours and padding would change the scale of the activations."""
    dev = calibration.speech(checkpoint, str(corpus), "dev")
    step = recipes.make_step("quantization", {"include": "blocks.1.*"})
    changed = core.run(copy.deepcopy(checkpoint), [step])
    save_checkpoint(tmp_path / "model.pt", changed)
    recognizer = load(tmp_path / "model.pt", 1, min_confidence=0)
    recognizer.detector = None  # training hears recordings whole
    # the corpus' tones are hum to it
    monkeypatch.setattr("asr.runtime.recognizer.settle_level", lambda waveform, _: waveform)
    expected = [recognizer.transcribe(u.audio_filepath).text for u in dev]
    dataset = BatchDataset(dev, checkpoint.tokenizer, checkpoint.features)
    texts = transcribe_alone(changed.model, dataset, checkpoint.tokenizer)
    assert texts == expected
    assert len(set(texts)) > 1
    wer = error_rates([u.text for u in dev], expected)["wer"]
    assert sensitivity.word_error_rate(checkpoint, changed.model, dev) == wer
    alone = calibration.load(checkpoint, batch_size=1)
    again = sensitivity.scan(checkpoint, settings.SETTINGS[:1], alone)
    for one, other in zip(found["layers"], again["layers"], strict=True):
        distances = [row["settings"][settings.SETTINGS[0]]["distance"] for row in (one, other)]
        assert distances[0] == pytest.approx(distances[1], rel=1e-4)


def test_the_smallest_mix_within_an_error_rate(found):
    """An error rate that rises with what has been saved: bisection finds where it is too high."""

    def saved(steps):
        rows = {row["name"]: row for row in found["layers"]}
        texts = {text.split("=")[1].split(",")[0]: text for text in settings.SETTINGS}
        total = 0
        for step in steps:
            text = texts[step.config.precision]
            for name in step.config.include.split(","):
                total += rows[name]["bytes"] - rows[name]["settings"][text]["bytes"]
        return total / found["bytes"]

    def rate(steps):
        return 0.1 * (1 + 0.08 * saved(steps))

    steps, before, after = mixing.fit_wer(found, 0.05, rate)
    assert 0.5 < saved(steps) <= 0.625
    assert (before, after) == (0.1, rate(steps))
    everything, _, _ = mixing.fit_wer(found, 0.05, lambda steps: 0.1)
    assert saved(everything) > 0.85
    with pytest.raises(ValueError, match=r"no mix of .* within 5.0%"):
        mixing.fit_wer(found, 0.05, lambda steps: 0.2 if steps else 0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("melting", "unknown method"),
        ("quantization:precision", "not option=value"),
        ("quantization:bits=4", "unknown option 'bits'"),
        ("pruning:fine_tune_epochs=2", "does not fine-tune"),
        ("pruning:include=head", "chooses the layers"),
        ("factorization:size_ratio=2", "name rank or sparsity"),
        (STRUCTURED, "--by module"),
        (f"{INT4}+factorization:rank=4", "what packs last"),
        (f"{INT4}+{TERNARY}", "each once"),
        ("factorization:rank=4+melting", "unknown method"),
    ],
)
def test_settings_that_cannot_be_scanned(text, message):
    with pytest.raises(ValueError, match=message):
        settings.parse_setting(text, "layer")


def test_structured_pruning_is_scanned_by_modules(checkpoint, speech):
    found = sensitivity.scan(checkpoint, [STRUCTURED, INT4], speech, by="module")
    tried = {row["name"]: row["settings"] for row in found["layers"]}
    assert STRUCTURED in tried["blocks.0.ff1"]
    assert tried["head"].keys() == {INT4}
    del tried["blocks.0.ff1"][INT4]
    steps = mixing.fit(found, mixing.least(found))
    assert {step.method: step.config.include for step in steps}["pruning"] == "blocks.0.ff1"
    result = core.run(copy.deepcopy(checkpoint), steps)
    assert result.model.blocks[0].ff1.args["hidden"] == 64
    assert type(result.model.blocks[1].ff1.up).__name__ == "QuantLinear"


def test_methods_are_chained_and_mixed(checkpoint, speech):
    """A module may become narrower or lower in rank, and be packed; the scan's bytes are right."""
    narrow, low = f"{STRUCTURED}+{INT4}", f"factorization:rank=4+{settings.INT8}"
    found = sensitivity.scan(checkpoint, [low, narrow, TERNARY], speech, by="module")
    rows = {row["name"]: row for row in found["layers"]}
    for name, row in rows.items():
        keep = {"blocks.0.ff1": narrow, "blocks.0.attn": low}.get(name, TERNARY)
        assert keep in row["settings"], name
        row["settings"] = {keep: row["settings"][keep]}
    assert low in json.loads(json.dumps(found))["settings"]
    steps = mixing.fit(found, mixing.least(found))
    assert [step.method for step in steps][:2] == ["pruning", "factorization"]
    result = core.run(copy.deepcopy(checkpoint), steps)
    model = result.model
    assert model.blocks[0].ff1.args["hidden"] == 64
    assert type(model.blocks[0].ff1.up).__name__ == "QuantLinear"
    assert model.blocks[0].attn.query.args["rank"] == 4
    assert type(model.blocks[0].attn.query.up).__name__ == "Int8Linear"
    assert model.blocks[1].ff1.up.precision == "ternary"
    for name, row in rows.items():
        (option,) = row["settings"].values()
        assert sensitivity.stored(model, row["layers"]) == option["bytes"], name
        assert option["distance"] > 0


def test_what_is_wrong_with_a_setting_is_said(checkpoint, speech, monkeypatch):
    """Only layers that would not shrink are passed over."""

    def broken(*_):
        raise ValueError("the cause")

    monkeypatch.setattr(factorization, "principal_components", broken)
    with pytest.raises(ValueError, match="the cause"):
        sensitivity.scan(checkpoint, ["factorization:rank=4"], speech)


def test_script_and_compress_together(checkpoint, tmp_path, corpus, capsys):
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    main = runpy.run_path(str(SCRIPT))["main"]
    model = ["--model_path", str(tmp_path / "model.pt")]
    arguments = ["--output_dir", str(tmp_path / "scan"), "--by", "module", "--settings", INT4]
    assert main([*model, *arguments, "--dev_data", str(corpus)]) == 0
    scan = tmp_path / "scan" / "sensitivity.json"
    assert json.loads(scan.read_text())["command"].startswith("python scripts/sensitivity.py")
    assert (tmp_path / "scan" / "sensitivity.png").read_bytes().startswith(b"\x89PNG")

    mix = ["--sensitivity", str(scan), "--output_dir", str(tmp_path / "out")]
    assert cli.main([*model, *mix, "--target_size_mb", "0.06"]) == 0
    written = tmp_path / "out" / "model.pt"
    assert written.stat().st_size <= 60_000
    kinds = {type(m).__name__ for m in load_checkpoint(written).model.modules()}
    assert {"QuantLinear", "Linear"} <= kinds
    capsys.readouterr()
    assert cli.main([*model, *mix, "--max_wer_increase", "0.5"]) == 0
    assert re.search(
        r"dev WER \d+\.\d+% before, \d+\.\d+% after \(\d+ utt", capsys.readouterr().out
    )

    capsys.readouterr()
    other = Checkpoint(copy.deepcopy(checkpoint.model), checkpoint.tokenizer)
    other.model.set_submodule("head", nn.Linear(32, 5, bias=False))
    save_checkpoint(tmp_path / "other.pt", other)
    mix = ["--sensitivity", str(scan), "--output_dir", str(tmp_path / "none")]
    for arguments in (
        ["--model_path", str(tmp_path / "other.pt"), *mix, "--target_size_mb", "0.06"],
        [*model, *mix, "--target_size_mb", "0.001"],
        [*model, *mix],
        [*model, *mix, "--target_size_mb", "1", "--max_wer_increase", "0.1"],
    ):
        assert cli.main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_speech_is_loaded_where_the_scan_needs_it(checkpoint, speech, tmp_path, capsys):
    """The settings of the scan say so; the checkpoint names its data."""
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    aware = "clustering:num_clusters=4,activation_aware=true"
    scan = tmp_path / "scan.json"
    scan.write_text(json.dumps(sensitivity.scan(checkpoint, [aware], speech, by="module")))
    arguments = ["--model_path", str(tmp_path / "model.pt"), "--sensitivity", str(scan),
                 "--target_size_mb", "0.1", "--dry_run"]  # fmt: skip
    assert cli.main(arguments) == 0
    assert "ClusteredLinear" in capsys.readouterr().out


def test_a_model_that_names_no_data(checkpoint, found, tmp_path, corpus, capsys, monkeypatch):
    """--max_wer_increase asks for --dev_data, before scanning, and never takes test data."""
    save_checkpoint(tmp_path / "model.pt", Checkpoint(checkpoint.model, checkpoint.tokenizer))
    scan, test = tmp_path / "scan.json", tmp_path / "test.json"
    scan.write_text(json.dumps(found))
    test.write_text((corpus / "dev.json").read_text())
    model = ["--model_path", str(tmp_path / "model.pt"), "--dry_run"]
    mix = [*model, "--sensitivity", str(scan), "--max_wer_increase", "0.5"]
    assert cli.main([*mix, "--dev_data", str(corpus)]) == 0
    monkeypatch.setattr(mixing, "scan", None)
    monkeypatch.setattr("compress.run.choose_mix", None)
    capsys.readouterr()
    for arguments, message in (
        (mix, "names no training data: give --dev_data"),
        ([*model, "--max_wer_increase", "0.5"], "give --dev_data"),
        ([*mix, "--dev_data", str(test)], "only test data"),
        ([*mix, "--dev_data", str(tmp_path / "none")], "none"),
    ):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    gone = Checkpoint(checkpoint.model, checkpoint.tokenizer, data={"train": "gone"})
    save_checkpoint(tmp_path / "model.pt", gone)
    assert cli.main(mix) == 2
    assert "gone: the data that the checkpoint was trained on is gone" in capsys.readouterr().err


def test_test_data_is_never_looked_at(checkpoint, tmp_path, corpus, capsys):
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    test = tmp_path / "test.json"
    test.write_text((corpus / "dev.json").read_text())
    main = runpy.run_path(str(SCRIPT))["main"]
    model = ["--model_path", str(tmp_path / "model.pt"), "--output_dir", str(tmp_path / "out")]
    assert main([*model, "--calibration_data", str(test)]) == 2
    assert "only test data (test)" in capsys.readouterr().err
    assert main([*model, "--dev_data", str(test)]) == 2
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_told_before_the_scan(
    checkpoint, tmp_path, capsys, monkeypatch
):
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    (tmp_path / "out" / "sensitivity.json").mkdir(parents=True)
    monkeypatch.setattr(sensitivity, "scan", None)
    main = runpy.run_path(str(SCRIPT))["main"]
    model = ["--model_path", str(tmp_path / "model.pt")]
    assert main([*model, "--output_dir", str(tmp_path / "out")]) == 2
    assert "sensitivity.json: a folder" in capsys.readouterr().err
