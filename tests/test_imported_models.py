"""What works on one's own models works on imported ones: decoding, training, export and all."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import torch

from asr.corpus.manifest import Utterance, read_manifest
from asr.importing.nemo import import_nemo
from asr.network.checkpoint import load_checkpoint, save_checkpoint
from asr.network.export import to_onnx
from asr.runtime import transcribe
from asr.runtime.beam import BeamConfig, BeamSearch
from asr.runtime.features import log_mel
from asr.runtime.recognizer import load
from asr.runtime.tokenizer import Tokenizer, join, word_spans
from asr.runtime.words import read_words
from asr.training import start, train
from compress import cli as compress_cli
from tests.corpus import write_corpus

DATA = Path(__file__).parent / "data" / "nemo"


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    """bpe.nemo as a checkpoint: 64 pieces and an unknown one, 8 times fewer frames."""
    path = tmp_path_factory.mktemp("imported") / "model.pt"
    save_checkpoint(path, import_nemo(DATA / "bpe.nemo").checkpoint)
    return path


@pytest.fixture(scope="module")
def exported(imported) -> Path:
    path = imported.with_name("model.onnx")
    to_onnx(load_checkpoint(imported), path)
    return path


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    numbers = np.load(DATA / "bpe.npz")
    path = tmp_path_factory.mktemp("clip") / "clip.wav"
    soundfile.write(path, numbers["audio"], 16000, subtype="PCM_16")
    return path


def nemo_ids() -> list[int]:
    """The greedy tokens of NeMo's log-probabilities, in our numbers."""
    numbers = np.load(DATA / "bpe.npz")
    best = numbers["log_probs"][0, : numbers["out_len"][0]].argmax(axis=1)
    kept = best[np.append(True, np.diff(best) != 0)]
    return [64 if i == 0 else int(i) for i in kept if i != 64]


# ---- tokens -----------------------------------------------------------------------------------


def test_bytes_capitals_and_unknown_pieces_become_text():
    euro = [f"<0x{byte:02X}>" for byte in "€".encode()]
    tokens = ["<blk>", "▁Hi", ",", "▁", *euro, "5", "<s>", "<unk>"]
    tokenizer = Tokenizer(tokens)
    assert tokenizer.decode([8, 1, 2, 3, 4, 5, 6, 7]) == "Hi, €5"
    assert tokenizer.decode([1, 9, 7]) == "Hi ⁇ 5"
    assert tokenizer.decode([4, 5, 1]) == "\ufffd Hi"  # cut characters stay visible
    assert tokenizer.formatted
    assert not Tokenizer.characters().formatted
    texts = [tokens[i] for i in (1, 9, 7)]
    assert [join(texts[a:b]) for a, b in word_spans(texts)] == ["Hi", "⁇", "5"]


def test_words_are_those_of_the_text(imported):
    numbers = np.load(DATA / "bpe.npz")
    checkpoint = load_checkpoint(imported)
    log_probs = numbers["log_probs"][0][:, [64, *range(1, 64), 0]]
    words = read_words(log_probs, nemo_ids(), checkpoint.tokenizer.tokens, 0.08)
    assert " ".join(w.text for w in words) == checkpoint.tokenizer.decode(nemo_ids())


@pytest.mark.parametrize("size", [128, 8192])
def test_beam_search_of_large_vocabularies_finds_the_likeliest(size):
    rng = np.random.default_rng(0)
    tokens = ["<blk>", *(f"{'▁' * (i % 3 == 0)}t{i}" for i in range(size - 2)), "<unk>"]
    path = rng.integers(0, size, 40)
    path[10:20] = size - 1
    log_probs = np.full((40, size), -12.0)
    log_probs[np.arange(40), path] = -0.001
    search = BeamSearch(tokens, BeamConfig(beam_size=8))
    kept = path[np.append(True, np.diff(path) != 0)]
    assert search(log_probs) == [i for i in kept.tolist() if i]


def test_a_language_model_hears_past_capitals_and_punctuation(tmp_path):
    arpa = tmp_path / "lm.arpa"
    words = {"<s>": -99, "</s>": -1, "<unk>": -3, "hello": -0.5, "world": -0.7}
    lines = [f"{score}\t{word}" for word, score in words.items()]
    arpa.write_text("\\data\\\nngram 1=5\n\n\\1-grams:\n" + "\n".join(lines) + "\n\n\\end\\\n")
    from asr.runtime.language_model import WordModel

    model = WordModel(arpa, BeamConfig(lm=str(arpa)))
    start = model.start()
    assert model.score(start, "Hello,")[0] == model.score(start, "hello")[0]
    assert model.score(start, "…") == (0.0, start)
    assert model.ahead("Worl") == model.ahead("worl")
    assert model.score(start, "Helloo,")[0] < model.score(start, "hello")[0] - 3


# ---- other runtimes ---------------------------------------------------------------------------


def test_greedy_and_beam_read_what_nemo_reads(imported, exported, recording):
    expected = load_checkpoint(imported).tokenizer.decode(nemo_ids())
    assert load(imported, min_confidence=0).transcribe(recording).text == expected
    assert load(exported, threads=1, min_confidence=0).transcribe(recording).text == expected
    assert load(exported, beam=BeamConfig(beam_size=8), min_confidence=0).transcribe(recording).text


def test_onnx_asr_reads_the_same_tokens(exported, recording, tmp_path):
    onnx_asr = pytest.importorskip("onnx_asr")
    shutil.copy(exported, tmp_path / "model.onnx")
    shutil.copy(exported.with_name("tokens.txt"), tmp_path / "vocab.txt")
    config = {"model_type": "nemo-conformer-ctc", "features_size": 80, "subsampling_factor": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = onnx_asr.load_model("nemo-conformer-ctc", tmp_path)
    found = model.recognize(str(recording)).replace("<unk>", " ⁇ ")
    expected = load_checkpoint(exported.with_name("model.pt")).tokenizer.decode(nemo_ids())
    assert " ".join(found.split()).replace(" ", "") == expected.replace(" ", "")


def test_sherpa_reads_the_same_tokens(exported, recording):
    pytest.importorskip("sherpa_onnx")
    sherpa = import_module("experiments.check_sherpa_onnx").Sherpa(exported)
    waveform, _ = soundfile.read(recording, dtype="float32")
    # sherpa frames start half a hop later; these random weights answer to every difference
    tokens = load_checkpoint(exported.with_name("model.pt")).tokenizer.tokens
    text = sherpa.transcribe(np.pad(waveform, (80, 0)))
    assert text
    assert all(any(t.strip("▁") in text for t in tokens[1:]) for _ in text)


def foreign(exported: Path, folder: Path, **beside: str) -> Path:
    """The export as NeMo would write it: blank last, no metadata; with the files `beside` it."""
    model = onnx.load(exported)
    del model.metadata_props[:]
    (node,) = [n for n in model.graph.node if "logprobs" in n.output]
    node.output[list(node.output).index("logprobs")] = "inner"
    order = np.array([64, *range(1, 64), 0])
    model.graph.initializer.append(onnx.numpy_helper.from_array(order, "order"))
    gather = onnx.helper.make_node("Gather", ["inner", "order"], ["logprobs"], axis=2)
    model.graph.node.append(gather)
    path = folder / "theirs.onnx"
    onnx.save(model, path)
    for name, text in beside.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return path


def their_tokens(exported: Path) -> str:
    lines = [
        line.split(" ")[0] for line in exported.with_name("tokens.txt").read_text().split("\n")
    ]
    return "".join(f"{t} {i}\n" for i, t in enumerate([lines[64], *lines[1:64], "<blk>"]))


@pytest.mark.parametrize("name", ["tokens", "vocab"])
def test_somebody_elses_onnx_runs_as_it_is(exported, recording, tmp_path, capsys, name):
    path = foreign(exported, tmp_path, **{name: their_tokens(exported)})
    argv = ["--model_path", str(path), "--audio_path", str(recording), "--min_confidence", "0"]
    assert transcribe.main(argv) == 0
    expected = load_checkpoint(exported.with_name("model.pt")).tokenizer.decode(nemo_ids())
    assert capsys.readouterr().out.strip() == expected


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({}, "no tokens.txt or vocab.txt"), ({"tokens": "a 0\nb 1\n"}, "2 tokens for"),
        ({"tokens": "a 0\nb 0\n"}, "line 2"), ({"tokens": "a b\n"}, "line 1"),
    ],
)  # fmt: skip
def test_missing_token_lists_are_one_line(exported, recording, tmp_path, capsys, beside, message):
    path = foreign(exported, tmp_path, **beside)
    assert transcribe.main(["--model_path", str(path), "--audio_path", str(recording)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# ---- training ---------------------------------------------------------------------------------


def train_flags(corpus: Path, output: Path, start: Path, *more: str) -> list[str]:
    return [
        "--data_dir", str(corpus), "--output_dir", str(output), "--init_from", str(start),
        "--epochs", "1", "--num_workers", "0", "--threads", "1", "--no-tensorboard", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), per_text=1)


def test_an_imported_model_is_fine_tuned(imported, corpus, tmp_path):
    assert train.main(train_flags(corpus, tmp_path / "run", imported)) == 0
    before, after = load_checkpoint(imported), load_checkpoint(tmp_path / "run" / "model.pt")
    assert after.features == before.features
    assert after.tokenizer.tokens == before.tokenizer.tokens
    assert after.tokenizer.sentencepiece_model == before.tokenizer.sentencepiece_model
    assert not torch.equal(after.model.head.weight, before.model.head.weight)
    assert [entry["step"] for entry in after.history] == ["import", "init", "train"]


def test_new_tokens_keep_the_encoder(imported, corpus, tmp_path):
    more = ["--new_tokens", "--alphabet", "auto", "--head_epochs", "1"]
    assert train.main(train_flags(corpus, tmp_path / "run", imported, *more)) == 0
    before, after = load_checkpoint(imported), load_checkpoint(tmp_path / "run" / "last.pt")
    assert after.tokenizer.tokens[:2] == ["<blk>", "▁"]
    assert after.model.config.vocab_size == len(after.tokenizer) < 10
    old, new = before.model.state_dict(), after.model.state_dict()
    changed = [key for key in old if not torch.equal(old[key], new[key])]
    assert changed == ["head.weight", "head.bias"]


def test_new_tokens_need_a_model(corpus, tmp_path, capsys):
    argv = ["--data_dir", str(corpus), "--output_dir", str(tmp_path / "run"), "--new_tokens"]
    assert train.main(argv) == 2
    assert "--init_from" in capsys.readouterr().err


def test_texts_keep_their_capitals_for_models_that_write_them(imported, corpus):
    from asr.training.train_config import TrainConfig

    checkpoint = load_checkpoint(imported)
    audio = str(next(corpus.glob("*.wav")))
    utterances = [Utterance(audio, 3.0, "it's ok.", written="It’s OK.")]
    checkpoint.tokenizer = Tokenizer(["<blk>", *"▁abcdefghijklmnopqrstuvwxyz'ITOK.’"])
    (kept,) = start.usable(utterances, checkpoint, TrainConfig(), print)
    assert kept.text == "It’s OK."
    checkpoint.tokenizer = Tokenizer.characters("abcdefghijklmnopqrstuvwxyz'.")
    manifest = corpus / "capitals.jsonl"
    manifest.write_text(json.dumps({"audio_filepath": audio, "duration": 1, "text": "A  B"}))
    (read,) = read_manifest(manifest)
    assert (read.text, read.written) == ("a b", "A B")
    manifest.unlink()


# ---- compression ------------------------------------------------------------------------------

METHODS = {
    "int8": "--method quantization --precision int8",
    "int4": "--method quantization --precision int4",
    "pruning": "--method pruning --sparsity 0.5",
    "structured": "--method pruning --pruning_type structured --sparsity 0.25",
    "factorization": "--method factorization --size_ratio 2",
    "clustering": "--method clustering",
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_compresses_an_imported_model(imported, recording, tmp_path, name, capsys):
    argv = ["--model_path", str(imported), "--output_dir", str(tmp_path), *METHODS[name].split()]
    assert compress_cli.main(argv) == 0, capsys.readouterr().err
    assert (tmp_path / "model.pt").stat().st_size < imported.stat().st_size
    load(tmp_path / "model.pt").transcribe(recording)


def test_log_probabilities_of_the_export_are_nemos(exported, recording):
    numbers = np.load(DATA / "bpe.npz")
    recognizer = load(exported, threads=1)
    waveform, _ = soundfile.read(recording, dtype="float32")
    (found,) = recognizer.log_probs([log_mel(waveform, recognizer.info.features)])
    expected = numbers["log_probs"][0, : len(found)][:, [64, *range(1, 64), 0]]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def commands(page: Path) -> list[list[str]]:
    """The commands in a page's code blocks, without `python`."""
    blocks = page.read_text(encoding="utf-8").split("```")[1::2]
    lines = [line for block in blocks for line in block.strip().splitlines()]
    assert all(line.startswith("python ") for line in lines)
    return [line.split()[1:] for line in lines]


def test_every_command_of_the_page_runs(recording, tmp_path, monkeypatch, capsys):
    from asr.measure import evaluate
    from scripts import export_onnx, import_model, prepare_data
    from tests.test_importing_onnx import place

    programs = {
        "scripts/import_model.py": import_model, "compress.py": compress_cli, "train.py": train,
        "scripts/export_onnx.py": export_onnx, "transcribe.py": transcribe,
        "scripts/prepare_data.py": prepare_data, "evaluate.py": evaluate,
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copy(DATA / "bpe.nemo", "model.nemo")
    shutil.copy(recording, "clip.wav")
    Path("theirs").mkdir()
    place(Path("theirs"))
    for name in ("train/one", "train/two", "train/three", "test/four"):
        place_of = Path("recordings", name)
        place_of.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(recording, place_of.with_suffix(".wav"))
        place_of.with_suffix(".txt").write_text("gg ll")
    page = Path(__file__).parents[1] / "docs" / "importing.md"
    for program, *argv in commands(page):
        assert programs[program].main(argv) == 0, (program, argv, capsys.readouterr().err)
