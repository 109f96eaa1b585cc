"""Hotwords and grammars in the search, and how phrases are read."""

import json
import math

import numpy as np
import pytest
import soundfile

from asr.measure.evaluate import main as evaluate
from asr.runtime.beam import BeamConfig
from asr.runtime.language_model import load_decoder
from asr.runtime.phrases import HOTWORD_BONUS, Grammar, Hotwords, read_phrases
from asr.runtime.transcribe import main as transcribe
from tests.corpus import tone_waveform, write_corpus

TOKENS = ["<blk>", "▁", *"abcdefghijklmnopqrstuvwxyz'"]
PIECES = ["<blk>", "▁", "▁tu", "rn", "▁o", "n", "ff", "▁light", "s", "▁now"]


def said(text: str, sounds_like: dict[str, str] | None = None, tokens=TOKENS) -> np.ndarray:
    """log_probs of a spelled text; a letter of `sounds_like` is as likely as its likenesses + 1."""
    log_probs = np.full((2 * len(text), len(tokens)), -9.0)
    log_probs[1::2, 0] = 0
    for i, c in enumerate(text.replace(" ", "▁")):
        log_probs[2 * i, tokens.index(c)] = -0.5
        for other in (sounds_like or {}).get(c, ""):
            log_probs[2 * i, tokens.index(other)] = -1.5
    return log_probs


def decode(log_probs: np.ndarray, tokens=TOKENS, **options) -> str:
    ids = load_decoder(tokens, BeamConfig(**options))(log_probs)
    return " ".join("".join(tokens[i] for i in ids).replace("▁", " ").split())


def total(scorer, text: str) -> float:
    score, state = 0.0, scorer.start()
    for word in text.split():
        more, state = scorer.score(state, word)
        score += more
    return score + scorer.end(state)


# ---- hotwords ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0), ("a new day", 0), ("new york", 4), ("in new york now", 4), ("new new york", 4),
        ("new york city", 4 + 9), ("new york new york city", 4 + 4 + 9), ("york city", 0),
        ("new york hall", 4 + 1), ("city hall", 1), ("new york city hall", 4 + 9 + 1),
        ("hall", 1), ("new", 0), ("the new", 0),
    ],
)  # fmt: skip
def test_a_phrase_brings_its_bonus_when_it_is_whole(text, expected):
    phrases = {("new", "york"): 2.0, ("new", "york", "city"): 3.0, ("hall",): 1.0}
    assert total(Hotwords(phrases), text) == pytest.approx(expected)


def test_capitals_and_punctuation_hide_no_hotword():
    """Imported models write `Paris.` where somebody listens for `paris`, or the other way round."""
    hotwords = Hotwords({("New", "york"): 2.0, ("की",): 1.0})
    assert total(hotwords, "new York, is NEW “ York.") == pytest.approx(8)
    assert total(hotwords, "का") == 0
    assert hotwords.ahead("Yo") == hotwords.ahead("yo") == pytest.approx(1)
    tokens = ["<blk>", *"▁NYnewyork"]
    assert read_phrases("New york, ny", tokens) == {("New", "york"): 10.0, ("ny",): 10.0}


def test_a_phrase_is_lent_its_bonus_on_the_way():
    hotwords = Hotwords({("new", "york"): 2.0})
    score, state = hotwords.score(hotwords.start(), "new")
    assert score == 2.0
    assert hotwords.score(state, "day")[0] == hotwords.end(state) == -2.0
    assert [hotwords.ahead(p) for p in ("y", "yo", "york", "yorks", "x")] == [0.5, 1.0, 2.0, 0, 0]


def test_hotwords_add_to_what_another_scorer_says():
    class Letters:
        start = staticmethod(lambda: 0)
        score = staticmethod(lambda state, word: (-len(word), state + 1))
        end = staticmethod(lambda state: -100 * state)
        ahead = staticmethod(lambda prefix: -1)

    hotwords = Hotwords({("ab", "c"): 5.0}, Letters())
    assert total(hotwords, "ab c d") == 10 - 4 - 300
    assert hotwords.ahead("a") == -1 + 2.5


def test_a_hotword_wins_over_what_sounds_alike():
    """No language model is needed; other words stay as they were heard."""
    log_probs = said("the bat and the ran", {"b": "c", "r": "m"})
    assert decode(log_probs, beam_size=8) == "the bat and the ran"
    assert decode(log_probs, hotwords="cat") == "the cat and the ran"
    assert decode(log_probs, hotwords="the cat:1,the man:1") == "the cat and the man"
    assert decode(log_probs, hotwords="cat:0.5") == "the bat and the ran"
    assert decode(log_probs, hotwords="cat and:0.3, dog") == "the bat and the ran"
    assert decode(log_probs, hotwords="CAT") == "the cat and the ran"


# ---- grammars ---------------------------------------------------------------------------------


@pytest.fixture
def grammar(tmp_path):
    path = tmp_path / "commands.txt"
    path.write_text("turn on  # lights\n\nturn off\nturn off now\nnow\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("turn on", "turn on"), ("turn om", "turn on"), ("tern off", "turn off"),
        ("turn off now", "turn off now"), ("turn on now", "turn on now"),
        ("burn off", "turn off"), ("now now", "now now"), ("", ""),
    ],
)  # fmt: skip
def test_a_grammar_lets_only_its_phrases_pass(grammar, text, expected):
    assert decode(said(text), grammar=grammar) == expected


@pytest.mark.parametrize("text", ["the weather", "on and on", "what a lovely day", "turnip farm"])
def test_other_speech_is_none_of_the_phrases(grammar, text):
    assert decode(said(text), grammar=grammar) == ""


def test_one_other_word_makes_it_another_sentence(tmp_path):
    """However long the phrase is: most of it fits. A letter or two misheard do no harm."""
    path = tmp_path / "commands.txt"
    path.write_text("please turn on all of the lights in the kitchen\nplease turn on the heating\n")
    for text in (
        "please turn on all of the lights in the bedroom", "please turn off the heating",
        "please do not turn on the heating", "please turn on the heating tomorrow",
    ):  # fmt: skip
        assert decode(said(text), grammar=str(path)) == ""
    text = "please tern on all off the lights in the kitshen"
    assert decode(said(text), grammar=str(path)).endswith("in the kitchen")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tokens", [TOKENS, PIECES])
def test_whatever_is_said_the_text_is_of_the_grammar(grammar, tokens, seed):
    x = np.random.default_rng(seed).standard_normal((30, len(tokens))) * 3
    log_probs = x - np.logaddexp.reduce(x, axis=1, keepdims=True)
    text = decode(log_probs, tokens, grammar=grammar, beam_size=30)
    rest = text.split()
    while rest:
        n = next(n for n in (3, 2, 1) if " ".join(rest[:n]) in GRAMMAR)
        rest = rest[n:]


GRAMMAR = {"turn on", "turn off", "turn off now", "now"}


def test_ambiguous_beginnings_are_all_followed():
    grammar = Grammar([("a",), ("a", "b", "c"), ("b",)], TOKENS)
    for text, possible in (("a b", True), ("a b c", True), ("a b b", True), ("a c", False)):
        assert (total(grammar, text) == 0) is possible
    assert total(grammar, "") == 0
    assert total(grammar, "c") == -math.inf


# ---- reading ----------------------------------------------------------------------------------


def test_phrases_of_a_flag_and_of_a_file(tmp_path):
    expected = {("raspberry", "pi"): HOTWORD_BONUS, ("conformer",): 6.0, ("it's",): -1.5}
    assert read_phrases("Raspberry  Pi, conformer:6,it's:-1.5,", TOKENS) == expected
    path = tmp_path / "hot.txt"
    path.write_bytes("\ufeff# names\r\nraspberry pi\r\n\r\nconformer:6 # x\r\nit's:-1.5".encode())
    assert read_phrases(str(path), TOKENS) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no phrases in it"), (" , ", "no phrases"), (":3", "no phrases"),
        ("café", "the model cannot write 'é'"), ("a:b", "cannot write ':'"),
        ("route 66", "cannot write '6'"), ("a\u200bb", r"cannot write U\+200B ZERO WIDTH SPACE"),
        ("a:nan", "cannot write ':'"),
    ],
)  # fmt: skip
def test_phrases_that_cannot_be_heard_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        read_phrases(text, TOKENS)


def test_commands_take_hotwords_and_grammars(tiny_checkpoint, grammar, tmp_path, capsys):
    audio = tmp_path / "a.wav"
    soundfile.write(audio, tone_waveform("abc a"), 16000)
    commands = tmp_path / "letters.txt"
    commands.write_text("abc\n")
    flags = ["--audio_path", str(audio), "--model_path", str(tiny_checkpoint), "--threads", "1"]
    flags += ["--min_confidence", "0"]
    assert transcribe([*flags, "--grammar", str(commands)]) == 0
    assert set(capsys.readouterr().out.split()) <= {"abc"}
    assert transcribe([*flags, "--hotwords", "abc:500"]) == 0
    assert "abc" in capsys.readouterr().out
    for wrong, message in (
        (["--grammar", "no.txt"], "no.txt: no such file of phrases"),
        (["--grammar", str(commands), "--hotwords", "a"], "use it without lm and hotwords"),
        (["--hotwords", "a", "--lm_weight", "1"], "--lm_weight needs a language model"),
        (["--hotwords", "1"], "cannot write '1'"),
    ):
        assert transcribe([*flags, *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    data = write_corpus(tmp_path / "data", per_text=1) / "dev.json"
    out = tmp_path / "result.json"
    flags = ["--model_path", str(tiny_checkpoint), "--test_data", str(data), "--no_speed"]
    assert evaluate([*flags, "--output_path", str(out), "--grammar", str(commands)]) == 0
    assert json.loads(out.read_text())["decoding"]["grammar"].endswith("letters.txt")
    assert str(tmp_path) not in out.read_text()


@pytest.mark.parametrize("text", ["nowhere.txt", "./names", "lists/names"])
def test_a_file_that_is_missing_is_no_phrase(text):
    with pytest.raises(ValueError, match=f"{text}: no such file of phrases"):
        read_phrases(text, ["<blk>", "▁", *"abcdefghijklmnopqrstuvwxyz."])


def test_a_word_with_a_slash_is_one_where_it_can_be_written():
    assert read_phrases("tcp/ip", ["<blk>", "▁", *"tcpi/"]) == {("tcp/ip",): HOTWORD_BONUS}
