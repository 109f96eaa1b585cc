"""References as they are said."""

import pytest

from asr.measure.spoken import check_language, spoken


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", "hello world"),
        ("It’s 5 o'clock — «now».", "it's five o'clock now"),
        ("in 1,234 days", "in one thousand two hundred and thirty four days"),
        ("3.5 or 3,5", "three point five or three five"),
        ("the 21st of 2", "the twenty first of two"),
        ("room 007a", "room seven a"),
        ("9" * 400, " ".join(["nine"] * 400)),
        ("", ""),
    ],
)
def test_numbers_become_words(text, expected):
    assert spoken(text) == expected


def test_other_languages_have_their_numbers():
    assert spoken("Ich habe 21 Äpfel.", "de") == "ich habe einundzwanzig äpfel"
    assert spoken("हिन्दी ५!", "en") == "हिन्दी five"


def test_an_unknown_language_is_named():
    check_language("fr")
    with pytest.raises(ValueError, match="--normalize xx: no such language; one of am, ar"):
        check_language("xx")
