"""Words of scripts with combining marks stay whole, from the text to the score."""

import pytest

from asr.common.metrics import character_counts, word_counts
from asr.corpus.manifest import normalise
from asr.corpus.transcripts import words_of
from asr.runtime.tokenizer import Tokenizer, name_character
from scripts import build_lm
from tests.arpa import Arpa

TEXTS = {
    "Hindi": "हिन्दी क्षमा",
    "Tamil": "தமிழ் மொழி",
    "Thai": "สวัสดี ครับ",
    "Sinhala": "ශ්‍රී ලංකා",  # with a joiner
    "pointed Arabic": "مُحَمَّد كِتَابٌ",
    "pointed Hebrew": "שָׁלוֹם עֲלֵיכֶם",
    "Persian": "می‌خواهم بروم",  # with a non-joiner
    "Turkish": "İstanbul'da ışık",
    "Yoruba": "ẹ̀kọ́ dára",
}


@pytest.fixture(params=TEXTS)
def text(request):
    return normalise(TEXTS[request.param])


def test_words_stay_whole(text):
    assert words_of(f"«{text}», -- {text.split()[0]}!") == [*text.split(), text.split()[0]]
    assert len(text.split()) == 2


def test_tokenizers_give_the_text_back(text):
    pieces = len(set(text)) + 6
    for tokenizer in (
        Tokenizer.characters_of([text]), Tokenizer.bpe([text] * 3 + text.split(), pieces)
    ):  # fmt: skip
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_scores_count_words_and_signs(text):
    first, second = text.split()
    assert word_counts(text, text) == (0, 0, 0, 2)
    assert character_counts(text, text) == (0, 0, 0, len(text))
    assert word_counts(text, f"{first[:-1]} {second}") == (1, 0, 0, 2)


def test_language_models_have_the_words(text, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(f"{text}!\n", encoding="utf-8")
    flags = ["--text", str(tmp_path / "text.txt"), "--output_path", str(tmp_path / "lm.arpa")]
    assert build_lm.main([*flags, "--order", "2", "--prune", "0"]) == 0
    assert set(Arpa(tmp_path / "lm.arpa").words) == {"<unk>", "<s>", "</s>", *text.split()}


def test_the_dotted_capital_of_turkish_is_an_i():
    assert normalise("İZMİR I\u0307zmir") == "izmir izmir"


def test_marks_that_nobody_hears_are_left_out():
    assert words_of("a\u00adb \ufeffc\u200e d\u200be") == ["ab", "c", "d", "e"]


@pytest.mark.parametrize(
    ("character", "name"),
    [
        ("é", "'é'"), ("5", "'5'"), ("\u200b", "U+200B ZERO WIDTH SPACE"),
        ("\u00a0", "U+00A0 NO-BREAK SPACE"), ("\u0301", "U+0301 COMBINING ACUTE ACCENT"),
        ("\u093f", "U+093F DEVANAGARI VOWEL SIGN I"), ("\x07", "U+0007"), ("\ue000", "U+E000"),
    ],
)  # fmt: skip
def test_what_cannot_be_seen_is_named_by_its_code(character, name):
    assert name_character(character) == name
    with pytest.raises(ValueError, match="outside the alphabet") as raised:
        Tokenizer.characters("ab").encode(f"a{character}b")
    assert name in str(raised.value)
