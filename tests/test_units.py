"""Texts spoken by units of recordings: the units, what is put together, and training on it."""

import json

import numpy as np
import pytest

from asr.corpus.lexicon import phonemes, read_lexicon
from asr.corpus.manifest import read_manifest
from asr.corpus.units import Units, find_peaks
from asr.importing.phonemes import PhonemeRecogniser, SpelledWords
from asr.runtime.beam import BeamConfig, BeamSearch
from asr.training.train import main as train
from scripts import cut_units, label_by_phonemes, speak_texts
from tests.corpus import write_corpus
from tests.test_reduction import CONFIG, run, start  # noqa: F401
from tests.test_teach_front import recogniser  # noqa: F401

NAMES = ["<end>", "|", "a", "b", "c"]
LEXICON = {"ab": [2, 3], "ba": [3, 2], "c": [4]}


def recordings(*spoken):
    """Each symbol is heard for four frames that hold its number, speaker and place."""
    hidden: list[list[int]] = []
    phones, peaks, speakers = [], [], []
    for speaker, symbols in enumerate(spoken):
        at = len(hidden)
        peaks += [at + 4 * i for i in range(len(symbols))]
        phones += symbols
        speakers += [speaker] * len(symbols)
        hidden += [[s, speaker, i] for s in symbols for i in range(4)][:-3]
    phones, peaks, speakers = (np.array(x, np.int32) for x in (phones, peaks, speakers))
    return Units(np.array(hidden, np.float16), phones, peaks, speakers, NAMES)


def test_what_was_recorded_is_said_as_it_was():
    units = recordings([0, 2, 3, 1, 4, 0], [0, 4, 0])
    said = units.speak(units.spell(["ab", "c"], LEXICON), np.random.default_rng(0))
    np.testing.assert_array_equal(said, units.hidden[:21])


def test_units_join_in_the_middle_of_a_phoneme():
    units = recordings([0, 2, 3, 0], [0, 3, 1, 4, 0])  # ab; b c
    said = units.speak(units.spell(["ab", "c"], LEXICON), np.random.default_rng(0))
    assert said[:, 0].tolist() == [0] * 4 + [2] * 4 + [3] * 4 + [1] * 4 + [4] * 4 + [0]
    assert said[:8, 1].tolist() == [0] * 8
    assert said[8, 1] == 0.5  # the mean of both
    assert said[9:, 1].tolist() == [1] * 12


def test_the_longest_unit_and_the_speaker_before_are_preferred():
    units = recordings([0, 2, 0], [0, 2, 3, 0], [0, 4, 1, 2, 3, 0], [0, 4, 0], [0, 4, 1, 2, 0])
    said = units.speak(units.spell(["c", "ab"], LEXICON), np.random.default_rng(3))
    assert set(said[:, 1].tolist()) == {2}
    units = recordings([0, 2, 3], [3, 1, 0], [3, 4], [3, 1], [0, 2, 3], [1, 4, 0], [1, 4, 0])
    for seed in range(9):
        said = units.speak([0, 2, 3, 1, 4, 0], np.random.default_rng(seed))
        assert said[:4, 1].tolist() in ([0] * 4, [4] * 4)


def test_neighbours_that_nobody_has_said_are_not_made_up():
    units = recordings([0, 2, 0], [0, 3, 0])
    assert units.speak(units.spell(["ab"], LEXICON), np.random.default_rng(0)) is None
    with pytest.raises(KeyError):
        units.spell(["abc"], LEXICON)


def test_units_are_stored(tmp_path):
    units = recordings([0, 2, 3, 0])
    units.save(tmp_path / "units.npz")
    read = Units.load(tmp_path / "units.npz")
    for name in ("hidden", "phones", "peaks", "speakers", "names"):
        np.testing.assert_array_equal(getattr(read, name), getattr(units, name))
    with pytest.raises(ValueError, match="no such file"):
        Units.load(tmp_path / "other.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="not a file of scripts/cut_units"):
        Units.load(tmp_path / "bad.npz")


def test_phonemes_are_found_where_they_are_heard_best():
    probabilities = np.full((9, 4), 0.01)
    for frame, symbol in enumerate([0, 1, 1, 0, 2, 0, 2, 3, 0]):
        probabilities[frame, symbol] = 0.9
    probabilities[2, 1] = 0.95
    log_probs = np.log(probabilities / probabilities.sum(1, keepdims=True))
    peaks, fit = find_peaks(log_probs, np.array([1, 2, 2, 3]))
    assert peaks.tolist() == [2, 4, 6, 7]
    assert fit == pytest.approx(log_probs.max(1).mean())
    assert find_peaks(log_probs, np.array([2, 1]))[1] < fit - 1
    with pytest.raises(ValueError, match="3 tokens do not fit into 2 frames"):
        find_peaks(log_probs[:2], np.array([1, 2, 3]))


def test_a_lexicon_is_read_as_english(tmp_path):
    path = tmp_path / "lexicon.tsv"
    path.write_text("the\tð i\nto\tt̪ o\nto\tt u\nred\tr ɛ ̪ d\n", encoding="utf-8")
    lexicon = read_lexicon(path)
    assert lexicon == {"the": ("ð", "i"), "to": ("t", "oʊ"), "red": ("ɹ", "ɛ", "d")}
    assert phonemes(lexicon | {"oh": ("oʊ",)}, ["oʊ", "i", "t", "x"]) == ["oʊ"]
    path.write_text("the ð i\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"lexicon\.tsv, line 1: 'the ð i' is not a word, a tab"):
        read_lexicon(path)


def test_sentences_are_of_known_words_and_rare_ones(tmp_path):
    text = tmp_path / "text.txt"
    common = "\n".join(f"one two three w{i}" for i in range(300))
    text.write_text("one two three\n" * 400 + "one unknown two\ntoo short\n" + common)
    known = {"one", "two", "three", *(f"w{i}" for i in range(300))}
    found = speak_texts.draw(str(text), known, 250, np.random.default_rng(0))
    assert len(found) > 100
    assert len({tuple(words) for words in found}) == len(found)
    assert all(known.issuperset(words) and len(words) >= 3 for words in found)


def test_texts_are_cut_spoken_and_learnt(start, recogniser, tmp_path, monkeypatch, capsys):  # noqa: F811
    """From end to end, with random weights: nothing fits, so all is taken."""
    monkeypatch.setattr(cut_units, "LEAST", -np.inf)
    data = write_corpus(tmp_path / "texts", 1)
    lexicon = tmp_path / "lexicon.tsv"
    words = {w for line in (data / "train.json").read_text().splitlines()
             for w in json.loads(line)["text"].split()}  # fmt: skip
    lexicon.write_text("".join(f"{w}\t{' '.join(w)}\n" for w in sorted(words)), encoding="utf-8")
    symbols = ["b", "c", "ɑ", *(f"x{i}" for i in range(186))]
    recogniser.with_name("g2p_vocab.json").write_text(json.dumps({"decoder": symbols}))
    units, text = tmp_path / "units.npz", tmp_path / "text.txt"
    flags = ["--model_path", start, "--blocks", 2, "--teacher", recogniser, "--data_dir", data]
    flags += ["--lexicon", lexicon, "--output_path", units]
    assert cut_units.main([str(flag) for flag in flags]) == 0
    assert Units.load(units).hidden.shape[1] == CONFIG.d_model

    text.write_text("ab ba abc\nabc ab ba\nba ba ba\n" * 20)
    flags = ["--units", units, "--lexicon", lexicon, "--text", text, "--output_dir", tmp_path]
    assert speak_texts.main([*map(str, flags), "--sentences", "3"]) == 0
    manifest = tmp_path / "train-texts.json"
    spoken = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert spoken
    frames = np.load(spoken[0]["audio_filepath"])
    assert len(frames) == round(50 * spoken[0]["duration"])

    more = ["--data_dir", data, manifest, "--epochs", 1]
    folder = run(start, tmp_path, *more, "--freeze_epochs", 1)
    assert len(list((folder / "front").glob("*.npy"))) == 9  # what was spoken has passed it
    flags = ["--init_from", start, *more, "--freeze_blocks", 2, "--output_dir", tmp_path / "other"]
    assert train([str(flag) for flag in flags]) == 2
    assert "behind one that is frozen throughout: give --freeze_blocks" in capsys.readouterr().err


def test_pronouncing_needs_its_wheel_and_words(tmp_path, capsys):
    from scripts.pronounce import main

    assert main(["--output_path", str(tmp_path / "lexicon.tsv")]) == 2
    assert "whose words are to be pronounced" in capsys.readouterr().err


def test_words_are_found_by_their_sounds(recogniser, tmp_path, capsys):  # noqa: F811
    """Of two words that sound alike the likelier is written; other sounds are no word."""
    model = tmp_path / "model.arpa"
    model.write_text(
        "\\data\\\nngram 1=6\n\n\\1-grams:\n-9 <unk>\n-1 <s>\n-1 </s>\n-2 see\n-1 sea\n-1 a\n"
        "\n\\end\\\n",
        encoding="utf-8",
    )
    config = BeamConfig(lm=str(model))
    lexicon = {"see": ("s", "i"), "sea": ("s", "i"), "a": ("ə",)}
    words = SpelledWords(lexicon, ["i", "s", "ə"], config)
    i, s, schwa = words.letters[1:]
    assert words.text(f"{s}{i}▁{schwa}") == "sea a"
    assert words.score(words.start(), s)[0] < -100
    assert words.ahead(s) == words.score((), f"{s}{i}")[0]
    assert words.ahead(f"{i}{s}") < -100
    tokens = ["<blank>", *words.letters]
    probabilities = np.full((7, 5), 1e-3)
    for frame, token in enumerate([3, 2, 0, 1, 1, 4, 0]):  # s i, a boundary, a
        probabilities[frame, token] = 1
    ids = BeamSearch(tokens, config, words)(np.log(probabilities))
    assert words.text("".join(tokens[i] for i in ids)) == "sea a"


def test_recordings_are_labelled_by_phonemes(recogniser, tmp_path, capsys, monkeypatch):  # noqa: F811
    symbols = ["b", "c", "ɑ", *(f"x{i}" for i in range(186))]
    recogniser.with_name("g2p_vocab.json").write_text(json.dumps({"decoder": symbols}))
    data = write_corpus(tmp_path / "data", 1)
    lexicon, model, out = (tmp_path / name for name in ("lexicon.tsv", "m.arpa", "heard.json"))
    lexicon.write_text("ab\ta b\nba\tb a\nc\tc\na\ta\n", encoding="utf-8")
    model.write_text(
        "\\data\\\nngram 1=6\n\n\\1-grams:\n-9 <unk>\n-1 <s>\n-1 </s>\n-1 ab\n-1 ba\n-1 c\n"
        "\n\\end\\\n",
        encoding="utf-8",
    )
    flags = ["--teacher", recogniser, "--lexicon", lexicon, "--lm", model]
    given = [*map(str, [*flags, "--data_dir", data / "train.json", "--output_path", out])]
    said = iter(["ab"] * 5 + [""] + ["ba"] * 3)
    with monkeypatch.context() as patched:
        patched.setattr(PhonemeRecogniser, "__call__", lambda *_: next(said))
        assert label_by_phonemes.main(given) == 0
        assert [u.text for u in read_manifest(out)] == ["ab"] * 5 + ["ba"] * 3
        patched.setattr(PhonemeRecogniser, "__call__", lambda *_: "")
        assert label_by_phonemes.main(given) == 2
    assert "nothing was understood" in capsys.readouterr().err
    assert len(out.with_suffix(".part").read_text().splitlines()) == 9  # to go on with
    report = tmp_path / "report.json"
    tested = ["--test_data", str(data / "dev.json"), "--report_path", str(report)]
    assert label_by_phonemes.main([*map(str, flags), *tested]) == 0
    assert "WER" in capsys.readouterr().out
    assert {"command", "commit", "machine", "wer", "cer"} <= json.loads(report.read_text()).keys()
    assert label_by_phonemes.main([*map(str, flags)]) == 2
