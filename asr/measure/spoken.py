"""Texts as they are said, so that other people's references meet a model's words."""

from __future__ import annotations

import re
from decimal import Decimal

from asr.corpus import english
from asr.corpus.manifest import normalise
from asr.corpus.transcripts import words_of

NUMBER = re.compile(r"\d+(?:\.\d+)?")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def spoken(text: str, language: str = "en") -> str:
    """Lower case without punctuation, numbers as words of a language (a code of num2words).

    English is read as `prepare_data.py --normalize_text en` does: years, money, abbreviations too.
    ValueError for an unknown language.
    """
    if language == "en":
        return " ".join(words_of(english.say_signs(normalise(text))))
    text = THOUSANDS.sub("", normalise(text))
    return " ".join(words_of(NUMBER.sub(lambda found: f" {_say(found[0], language)} ", text)))


def check_language(language: str) -> None:
    """ValueError, in one line, for a language that has no numbers here."""
    try:
        from num2words import CONVERTER_CLASSES
    except ImportError:
        raise ValueError("numbers to words need num2words: pip install num2words") from None
    if language not in CONVERTER_CLASSES:
        known = ", ".join(sorted(CONVERTER_CLASSES))
        raise ValueError(f"--normalize {language}: no such language; one of {known}")


def _say(number: str, language: str) -> str:
    """A number in words; one too long to be said stays as it is."""
    from num2words import num2words

    try:
        words: str = num2words(Decimal(number), lang=language)
    except (ArithmeticError, IndexError, NotImplementedError, TypeError, ValueError):
        return number
    return words
