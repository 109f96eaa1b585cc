"""Words scored by a language model, and the commands that use one."""

import itertools
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import asr
from asr.corpus.manifest import Utterance
from asr.corpus.ngram import estimate, write_arpa
from asr.measure.evaluate import main as evaluate
from asr.runtime.beam import BeamConfig
from asr.runtime.language_model import WordModel, load_decoder
from asr.runtime.transcribe import main as transcribe
from experiments import check_pyctcdecode
from scripts import tune_lm
from tests import arpa
from tests.corpus import tone_waveform, write_corpus

TEXT = [
    s.split()
    for s in ("the cat sat", "the cat ran", "a dog ran", "the dog sat", "a cat", "the the dog ran")
]
TOKENS = ["<blk>", "▁", *"abcdefghijklmnopqrstuvwxyz'"]


@pytest.fixture
def model_path(tmp_path):
    path = tmp_path / "lm.arpa"
    write_arpa(path, estimate(TEXT, 3, []))
    return path


def sentence_score(scorer, words) -> float:
    total, state = 0.0, scorer.start()
    for word in words:
        score, state = scorer.score(state, word)
        total += score
    return total + scorer.end(state)


# ---- the scorer -------------------------------------------------------------------------------


@pytest.mark.parametrize("sentence", ["the cat ran", "a dog sat", "ran", ""])
def test_words_add_their_weighted_natural_logarithms(model_path, sentence):
    scorer = WordModel(model_path, BeamConfig(lm_weight=0.7, word_bonus=0.25))
    table, log10 = arpa.Arpa(model_path), 0.0
    history: tuple[str, ...] = ("<s>",)
    for word in [*sentence.split(), "</s>"]:
        log10 += table.log10(word, history)
        history = (*history, word)
    expected = 0.7 * math.log(10) * log10 + 0.25 * len(sentence.split())
    assert sentence_score(scorer, sentence.split()) == pytest.approx(expected, abs=1e-4)


def test_an_unknown_word_pays_for_every_letter(model_path):
    free, paid = (
        WordModel(model_path, BeamConfig(unknown_penalty=penalty)) for penalty in (0, 2.5)
    )
    words = ["the", "unheard", "cat"]
    difference = sentence_score(free, words) - sentence_score(paid, words)
    assert difference == pytest.approx(7 * 2.5, abs=1e-4)


def test_a_prefix_promises_its_best_word(model_path):
    scorer = WordModel(model_path, BeamConfig())
    table = arpa.Arpa(model_path)
    words = [w for w in table.words if w not in ("<s>", "</s>", "<unk>")]
    for prefix in ("t", "th", "the", "c", "a", "d", "do"):
        expected = max(scorer.score((), w)[0] for w in words if w.startswith(prefix))
        assert scorer.ahead(prefix) == pytest.approx(expected, abs=1e-6)
    assert scorer.ahead("x") < min(scorer.score((), w)[0] for w in words)
    assert scorer.ahead("xyz") < scorer.ahead("xy") - 0.9


def test_a_model_of_capitals_is_asked_in_capitals(model_path, tmp_path):
    write_arpa(tmp_path / "CAPITALS.arpa", estimate([[w.upper() for w in s] for s in TEXT], 3, []))
    small, capitals = (
        WordModel(path, BeamConfig()) for path in (model_path, tmp_path / "CAPITALS.arpa")
    )
    for words in (["the", "cat"], ["an", "unknown", "word"]):
        expected = sentence_score(small, words)
        assert sentence_score(capitals, words) == pytest.approx(expected, abs=1e-4)
    assert capitals.ahead("ca") == pytest.approx(small.ahead("ca"), abs=1e-4)


def test_of_words_that_differ_in_capitals_the_likeliest_is_asked(tmp_path):
    """A text with capitals has `March` and `march`, `The` and `the`, but `Paul` only so."""
    text = "The cat Paul|the Paul|MARCH|March cat|March the|march The|the the the dog"
    path = tmp_path / "mixed.arpa"
    write_arpa(path, estimate([s.split() for s in text.split("|")], 2, []))
    scorer, table = WordModel(path, BeamConfig(lm_weight=1.0, word_bonus=0.0)), arpa.Arpa(path)

    def expect(word, history=()):
        return pytest.approx(math.log(10) * table.log10(word, history), abs=1e-5)

    assert scorer.score((), "paul")[0] == scorer.score((), "PAUL")[0] == expect("Paul")
    assert scorer.score((), "mArCh")[0] == expect("March")
    assert scorer.score((), "march")[0] == expect("march")  # as it is written, if it is there
    _, state = scorer.score(scorer.start(), "the")
    assert scorer.score(state, "paul")[0] == expect("Paul", ("the",))
    assert scorer.ahead("pa") == scorer.ahead("PAU") == expect("Paul")
    assert scorer.ahead("mar") == expect("March")


def test_what_marks_sentences_is_no_word(model_path):
    scorer = WordModel(model_path, BeamConfig())
    for word in ("<s>", "</s>", "<unk>", "<S>"):
        assert scorer.score((), word)[0] == scorer.score((), "x" * len(word))[0]


# ---- decoding ---------------------------------------------------------------------------------


def test_the_model_chooses_the_word_that_fits(model_path):
    """The sounds say `the bat sat`, barely; the model has heard of cats only."""
    text = "the▁bat▁sat"
    log_probs = np.full((2 * len(text), len(TOKENS)), -12.0)
    log_probs[1::2, 0] = 0
    for i, c in enumerate(text):
        log_probs[2 * i, TOKENS.index(c)] = -0.1
    log_probs[8, TOKENS.index("c")] = -1.0
    for config, expected in (
        (BeamConfig(lm=str(model_path)), "the cat sat"),
        (BeamConfig(lm=str(model_path), lm_weight=0.0, unknown_penalty=0.0), "the bat sat"),
        (BeamConfig(), "the bat sat"),
    ):
        ids = load_decoder(TOKENS, config)(log_probs)
        assert "".join(TOKENS[i] for i in ids).replace("▁", " ") == expected


# ---- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected"), (b"no model", "expected .data. and found no model"),
        (b"\\data\\\nngram 1=3\n", "found its end"), (b"mmap lm\0", "a binary of kenlm's"),
    ],
)  # fmt: skip
def test_a_damaged_model_is_named(tmp_path, content, message):
    path = tmp_path / "broken.arpa"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"broken.arpa: .*{message}"):
        WordModel(path, BeamConfig())


def test_transcribe_explains_a_model_that_is_not_utf8(
    tiny_checkpoint, model_path, tmp_path, capsys
):
    model_path.write_bytes(model_path.read_bytes().replace(b"cat", b"caf\xe9"))
    soundfile.write(tmp_path / "a.wav", tone_waveform("ab"), 16000)
    flags = ["--model_path", str(tiny_checkpoint), "--audio_path", str(tmp_path / "a.wav")]
    assert transcribe([*flags, "--lm", str(model_path)]) == 2
    error = capsys.readouterr().err
    assert f"{model_path}: not a usable ARPA language model: not UTF-8 text" in error
    assert error.count("\n") == 1


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such language model"):
        WordModel(tmp_path / "lm.arpa", BeamConfig())


# ---- commands ---------------------------------------------------------------------------------


@pytest.fixture
def letters(tmp_path):
    """A model of the words a b c of the tone corpus."""
    path = tmp_path / "letters.arpa"
    write_arpa(path, estimate([list("abc"), list("cab")], 2, []))
    return path


def test_transcribe_with_a_model(tiny_checkpoint, letters, tmp_path, capsys):
    audio = tmp_path / "a.wav"
    soundfile.write(audio, tone_waveform("abc a"), 16000)
    flags = ["--audio_path", str(audio), "--model_path", str(tiny_checkpoint), "--threads", "1",
             "--min_confidence", "0"]  # fmt: skip
    texts = []
    for more in ([], ["--beam_size", "8"], ["--lm", str(letters), "--word_bonus", "9"]):
        assert transcribe([*flags, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) > 1
    beam = BeamConfig(lm=str(letters), word_bonus=9.0)
    assert texts[2] == asr.load(tiny_checkpoint, 1, beam, 0).transcribe(audio).text + "\n"


def test_evaluate_with_a_model(tiny_checkpoint, letters, tmp_path, capsys):
    data = write_corpus(tmp_path / "data", per_text=1) / "dev.json"
    out = tmp_path / "result.json"
    flags = [
        "--model_path", tiny_checkpoint, "--test_data", data, "--threads", 1, "--no_speed",
        "--output_path", out,
    ]  # fmt: skip
    assert evaluate([*map(str, flags), "--lm", str(letters), "--lm_weight", "0.25"]) == 0
    result = json.loads(out.read_text())
    assert result["decoding"]["lm_weight"] == 0.25
    assert result["decoding"]["lm"].endswith("letters.arpa")
    assert str(tmp_path) not in out.read_text()
    recognizer = asr.load(tiny_checkpoint, 1, BeamConfig(lm=str(letters), lm_weight=0.25), 0)
    for row in result["utterances"]:
        assert row["hypothesis"] == recognizer.transcribe(data.parent / f"{row['id']}.wav").text
    assert evaluate([*map(str, flags)]) == 0
    assert json.loads(out.read_text())["decoding"] == "greedy"


def test_tune_lm_tries_pairs_of_weights(tiny_checkpoint, letters, tmp_path, capsys):
    data = write_corpus(tmp_path / "data", per_text=1) / "dev.json"
    out = tmp_path / "tuned.json"
    flags = [
        "--model_path", tiny_checkpoint, "--lm", letters, "--dev_data", data, "--threads", 1,
        "--lm_weights", "0,0.5", "--word_bonuses", "1,2,-3", "--output_path", out,
    ]  # fmt: skip
    assert tune_lm.main([*map(str, flags)]) == 0
    result = json.loads(out.read_text())
    pairs = [(row["lm_weight"], row["word_bonus"]) for row in result["table"]]
    assert pairs[:6] == [(0, 1), (0, 2), (0, -3), (0.5, 1), (0.5, 2), (0.5, -3)]
    assert len(set(pairs)) == len(pairs) > 6
    best = min(result["table"], key=lambda row: (row["wer"], row["cer"]))
    assert result["best"] == {key: best[key] for key in ("lm_weight", "word_bonus", "wer")}
    printed = capsys.readouterr().out
    assert f"best: --lm_weight {best['lm_weight']:g} --word_bonus {best['word_bonus']:g}" in printed
    assert f"greedy: WER {result['greedy_wer']:.2%}" in printed
    assert result["command"].startswith("python scripts/tune_lm.py --model_path")
    assert result["machine"]["cores"] >= 1
    assert {"commit", "seed"} <= result.keys()
    assert str(tmp_path) not in out.read_text()


def test_tune_lm_looks_between_the_best_pair_and_its_neighbours():
    assert tune_lm.halfway((0.3, 0.7, 1.1), 0.7) == [0.5, 0.7, 0.9]
    assert tune_lm.halfway((3.0, 0.0, 1.5), 3.0) == [2.25, 3.0]
    assert tune_lm.halfway((0.12345678, 0.12345678), 0.12345678) == [0.12345678]


def test_tune_lm_points_out_the_edges_of_the_grid():
    def notes(weight, bonus, weights=(0.0, 0.5, 1.0), bonuses=(0.0, 1.0, 2.0)):
        best = {"lm_weight": weight, "word_bonus": bonus}
        return tune_lm.edge_notes(best, {"lm_weight": weights, "word_bonus": bonuses})

    assert notes(0.5, 0.5) == []
    first, second = notes(1.0, 0.0)
    assert "lm_weight, 1, is the largest" in first
    assert first.endswith("widen --lm_weights upwards")
    assert second.endswith("widen --word_bonuses downwards")
    assert notes(0.0, 1.0) == []  # no weight is negative
    assert notes(0.5, 1.0, weights=(0.5,)) == []  # the user fixed it


def test_tune_lm_prints_the_edge(tiny_checkpoint, letters, tmp_path, capsys):
    """An untrained model says far too much: the more a word costs, the better."""
    data = write_corpus(tmp_path / "data", per_text=1) / "dev.json"
    flags = ["--model_path", tiny_checkpoint, "--lm", letters, "--dev_data", data, "--threads", 1]
    grid = ["--lm_weights", "0.5", "--word_bonuses=-10,0"]
    assert tune_lm.main([*map(str, flags), *grid]) == 0
    assert "widen --word_bonuses downwards" in capsys.readouterr().out


def test_tune_lm_spreads_a_limit_over_the_speakers():
    utterances = [
        Utterance(f"{speaker}-{n}.wav", 1.0, "a", str(speaker))
        for speaker in (4, 2, 3, 1)
        for n in range(5)
    ]
    some = tune_lm.every_nth(utterances, 8)
    assert [u.speaker for u in some] == ["1", "1", "2", "2", "3", "3", "4", "4"]
    assert len({u.id for u in some}) == 8
    assert tune_lm.every_nth(utterances, 0) == tune_lm.every_nth(utterances, 99) == utterances


@pytest.mark.parametrize("flag", ["--limit", "--threads"])
def test_tune_lm_refuses_negative_counts(flag, capsys):
    flags = ["--model_path", "m.pt", "--lm", "l", "--dev_data", "d", flag, "-1"]
    assert tune_lm.main(flags) == 2
    assert f"{flag} -1 must be at least 0" in capsys.readouterr().err


def test_tune_lm_keeps_test_sets_closed(tiny_checkpoint, letters, tmp_path, capsys):
    data = write_corpus(tmp_path / "data", per_text=1) / "dev.json"
    flags = ["--model_path", str(tiny_checkpoint), "--lm", str(letters)]
    assert tune_lm.main([*flags, "--dev_data", str(data.rename(data.parent / "test_a.json"))]) == 2
    assert "test_a is a test set; name a dev set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lm", "no.arpa"], "no.arpa: no such language model"),
        (["--lm_weight", "0.5"], "--lm_weight needs a language model: --lm FILE"),
        (["--word_bonus", "0"], "--word_bonus needs a language model: --lm FILE"),
        (["--beam_size", "0"], "beam_size 0 must be at least 1"),
    ],
)
def test_commands_explain_mistakes(tiny_checkpoint, tmp_path, capsys, flags, message):
    soundfile.write(tmp_path / "a.wav", tone_waveform("ab"), 16000)
    model = ["--model_path", str(tiny_checkpoint)]
    data = write_corpus(tmp_path / "data", per_text=1) / "dev.json"
    for command, what in (
        (transcribe, ["--audio_path", str(tmp_path / "a.wav")]),
        (evaluate, ["--test_data", str(data), "--no_speed"]),
    ):
        assert command([*model, *what, *flags]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_check_pyctcdecode_compares_both(tiny_checkpoint, letters, tmp_path, monkeypatch):
    """With a stand-in for the package: it decodes greedily and keeps what it was given."""
    given = {}

    class Decoder:
        def decode(self, log_probs, beam_width):
            given["beam_width"] = beam_width
            ids = [i for i, _ in itertools.groupby(log_probs.argmax(axis=1))]
            return "".join(given["labels"][i] for i in ids)

    def build(labels, **options):
        given.update(options, labels=labels)
        return Decoder()

    stand = SimpleNamespace(build_ctcdecoder=build)
    monkeypatch.setitem(sys.modules, "pyctcdecode", stand)
    monkeypatch.setattr(check_pyctcdecode, "version", lambda name: f"{name} 0")
    data = write_corpus(tmp_path / "data", per_text=1) / "dev.json"
    out = tmp_path / "result.json"
    flags = ["--model_path", tiny_checkpoint, "--lm", letters, "--dev_data", data]
    flags += ["--lm_weight", "0.3", "--word_bonus", "0.2", "--beam_size", "5"]
    check_pyctcdecode.main([*map(str, flags), "--output_path", str(out)])
    tokens = asr.load(tiny_checkpoint, 1).info.tokens
    assert given["labels"] == ["", *(" " if t == "▁" else t for t in tokens[1:])]
    assert (given["alpha"], given["beta"], given["beam_width"]) == (0.3, 0.2, 5)
    result = json.loads(out.read_text())
    assert result["wer"].keys() == result["seconds"].keys() == {"ours", "pyctcdecode"}
    assert 0 <= result["identical"] <= 1
    assert str(tmp_path) not in out.read_text()


def test_check_pyctcdecode_names_a_missing_package(tiny_checkpoint, letters, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyctcdecode", None)
    flags = ["--model_path", str(tiny_checkpoint), "--lm", str(letters), "--dev_data", "x"]
    assert check_pyctcdecode.main(flags) == 2
    assert "pyctcdecode is not installed" in capsys.readouterr().err
