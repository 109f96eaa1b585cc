"""English texts as they are spoken: numbers, abbreviations and signs as words.

Numbers by num2words. What has several readings takes the most usual one: 1995 is a year, 3.5 "three
point five", $20 "twenty dollars", 7:30 "seven thirty", No. 5 "number five".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

SHORT = {
    "mr": "mister", "mrs": "missus", "ms": "miz", "dr": "doctor", "st": "saint",
    "prof": "professor", "capt": "captain", "gen": "general", "col": "colonel",
    "lt": "lieutenant", "rev": "reverend", "hon": "honorable", "jr": "junior", "sr": "senior",
    "vs": "versus", "etc": "et cetera", "no": "number", "vol": "volume",
    "approx": "approximately", "dept": "department",
}  # fmt: skip
SIGNS = {"&": "and", "%": "percent", "+": "plus", "=": "equals", "@": "at", "°": "degrees"}
MONEY = {"$": "dollar", "£": "pound", "€": "euro"}
UNITS = {"km": "kilometers", "kg": "kilograms", "cm": "centimeters", "mm": "millimeters"}
LONGEST = 15  # digits that are read as one number
NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"


def spoken(text: str) -> str:
    """The text in words of a-z and apostrophes, lower case; signs without a reading are dropped."""
    text = unicodedata.normalize("NFKD", text.translate({0x2018: "'", 0x2019: "'", 0x02BC: "'"}))
    text = say_signs("".join(c for c in text if not unicodedata.combining(c)).lower())
    words = re.sub(r"[^a-z']", " ", text).split()
    return " ".join(bare for word in words if (bare := word.strip("'")))


def say_signs(text: str) -> str:
    """A text in lower case with its abbreviations, numbers and signs as words."""
    text = re.sub(rf"\b({'|'.join(SHORT)})\.(?=\s|$)", lambda m: SHORT[m[1]], text)
    for pattern, say in RULES:
        text = re.sub(pattern, say, text)
    for sign, word in SIGNS.items():
        text = text.replace(sign, f" {word} ")
    return text


def words_of(number: str, **kind: str) -> str:
    """A number in words, cardinal unless another kind is asked for; a long one digit by digit."""
    from num2words import num2words

    plain = number.replace(",", "")
    if len(plain) > LONGEST:
        return " ".join(words_of(digit) for digit in plain if digit != ".")
    value = float(plain) if "." in plain else int(plain)
    said: str = num2words(value, lang="en", **kind)
    return f" {re.sub('[-,]', ' ', said)} "


def money(match: re.Match[str]) -> str:
    amount, unit = match[2], MONEY[match[1]]
    dollars, _, cents = amount.partition(".")
    plural = "" if dollars == "1" else "s"
    said = f"{words_of(dollars)} {unit}{plural}"
    return f"{said} {words_of(cents)} " if len(cents) == 2 and int(cents) else f"{said} "


def time_of_day(match: re.Match[str]) -> str:
    hour, minute = match[1], int(match[2])
    rest = "o'clock" if minute == 0 else ("oh " if minute < 10 else "") + words_of(str(minute))
    return f"{words_of(hour)} {rest} "


def year(match: re.Match[str]) -> str:
    return words_of(match[0], to="year")


RULES: list[tuple[str, Callable[[re.Match[str]], str]]] = [
    (rf"([$£€])\s?({NUMBER})", money),
    (r"\b(\d{1,2}):(\d{2})\b", time_of_day),
    (rf"({NUMBER})\s?({'|'.join(UNITS)})\b", lambda m: f"{words_of(m[1])} {UNITS[m[2]]}"),
    (r"\b(\d+)(?:st|nd|rd|th)\b", lambda m: words_of(m[1], to="ordinal")),
    (r"\b(?:1[1-9]\d\d|20[1-9]\d)\b(?![.,]\d)", year),
    (NUMBER, lambda m: words_of(m[0])),
]
