"""Characters and BPE pieces: round trips, other alphabets, and errors that name what is wrong."""

import sys

import pytest

from asr.runtime.tokenizer import BLANK, ENGLISH, SPACE, Tokenizer

SENTENCES = [
    "the quick brown fox jumps over the lazy dog", "don't wake the cat", "turn the light on",
    "what is the time now", "the dog and the cat wait at the door", "it's time to go home",
] * 5  # fmt: skip


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.bpe(SENTENCES, vocab_size=60)


def test_english_characters():
    tokenizer = Tokenizer.characters()
    assert len(tokenizer) == 29
    assert tokenizer.tokens[:2] == [BLANK, SPACE]
    assert set(tokenizer.tokens[2:]) == set(ENGLISH)
    assert tokenizer.encode("a cat") == [tokenizer.tokens.index(c) for c in ("a", SPACE, *"cat")]


@pytest.mark.parametrize("text", ["", "a", "don't stop", "the quick brown fox"])
def test_round_trip(text):
    tokenizer = Tokenizer.characters()
    ids = tokenizer.encode(text)
    assert 0 not in ids
    assert tokenizer.decode(ids) == text


def test_spaces_at_the_ends_are_dropped():
    tokenizer = Tokenizer.characters()
    assert tokenizer.encode("  hi ") == tokenizer.encode("hi")
    space = tokenizer.tokens.index(SPACE)
    assert tokenizer.decode([space, *tokenizer.encode("hi"), space, space]) == "hi"


def test_another_language_takes_its_own_letters():
    texts = ["žluťoučký kůň", "пила", "ぱん 犬"]
    tokenizer = Tokenizer.characters_of(texts)
    assert len(tokenizer) == 2 + len(set("".join(texts)) - {" "})
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unknown_characters_are_named():
    with pytest.raises(ValueError, match=r"'3' '€' in 'only 3€'.*--alphabet"):
        Tokenizer.characters().encode("only 3€")


def test_bpe_round_trip(bpe):
    assert len(bpe) == 60
    assert bpe.tokens[0] == BLANK
    for text in SENTENCES:
        ids = bpe.encode(text)
        assert 0 not in ids
        assert max(ids) < len(bpe)
        assert bpe.decode(ids) == text
        assert len(ids) < len(text)


def test_bpe_ids_are_positions_of_its_pieces(bpe):
    ids = bpe.encode("the cat")
    assert "".join(bpe.tokens[i] for i in ids) == f"{SPACE}the{SPACE}cat"


def test_bpe_comes_back_from_its_bytes_and_decodes_without_the_library(bpe, monkeypatch):
    ids = bpe.encode("the lazy dog")
    assert Tokenizer(bpe.tokens, bpe.sentencepiece_model).encode("the lazy dog") == ids
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert Tokenizer(bpe.tokens).decode(ids) == "the lazy dog"


def test_bpe_names_unknown_characters(bpe):
    with pytest.raises(ValueError, match="outside the alphabet: '7'"):
        bpe.encode("the 7 dogs")


def test_too_many_pieces_are_refused():
    with pytest.raises(ValueError, match="BPE with 5000 pieces"):
        Tokenizer.bpe(SENTENCES, vocab_size=5000)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["a", "b"], "first token"), ([BLANK], "first token"), ([], "first token"),
        ([BLANK, "a", "a"], "twice"),
    ],
)  # fmt: skip
def test_unusable_token_lists(tokens, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(tokens)


def test_an_empty_alphabet_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Tokenizer.characters(" ")
