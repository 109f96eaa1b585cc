"""Text to token ids and back. Id 0 is the CTC blank; `▁` stands for a space.

A tokenizer is a list of tokens: characters, or the pieces of a SentencePiece BPE model. Decoding
needs only the list, so a device needs neither torch nor sentencepiece.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

BLANK = "<blk>"
UNKNOWN = "<unk>"
SPACE = "▁"
WRITTEN = {UNKNOWN: "⁇", "<s>": "", "</s>": "", "<pad>": ""}  # as SentencePiece writes them
BYTES = re.compile("(?:<0x[0-9A-Fa-f]{2}>)+")  # pieces of characters that have none of their own
ENGLISH = "abcdefghijklmnopqrstuvwxyz'"


def name_character(character: str) -> str:
    """A character in quotes, or its code if it cannot be seen or not alone."""
    if character.isprintable() and not unicodedata.category(character).startswith(("M", "Z", "C")):
        return repr(character)
    return f"U+{ord(character):04X} {unicodedata.name(character, '')}".strip()


class Tokenizer:
    """Tokens in id order, and the SentencePiece model (bytes) if they are its pieces."""

    def __init__(self, tokens: Sequence[str], sentencepiece_model: bytes | None = None) -> None:
        if len(tokens) < 2 or tokens[0] != BLANK:
            raise ValueError(f"the first token must be {BLANK!r} and others must follow it")
        if len(set(tokens)) != len(tokens):
            raise ValueError("a token stands twice in the list")
        self.tokens = list(tokens)
        self.sentencepiece_model = sentencepiece_model
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        self._processor: Any = None

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def characters(cls, alphabet: str = ENGLISH) -> Tokenizer:
        """One token a character of `alphabet`, and the space."""
        letters = sorted(set(alphabet) - {" ", SPACE})
        if not letters:
            raise ValueError("the alphabet is empty")
        return cls([BLANK, SPACE, *letters])

    @classmethod
    def characters_of(cls, texts: Iterable[str]) -> Tokenizer:
        """One token for every character that the texts use: another language in one line."""
        return cls.characters("".join(sorted(set("".join(texts)))))

    @classmethod
    def bpe(cls, texts: Iterable[str], vocab_size: int = 128) -> Tokenizer:
        """Trains a SentencePiece BPE of `vocab_size` pieces, the blank included."""
        import io

        import sentencepiece

        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                character_coverage=1.0,
                normalization_rule_name="identity",  # texts are; the usual one parts Persian words
                unk_id=0,  # id 0 becomes our blank: CTC has no unknown symbol
                bos_id=-1,
                eos_id=-1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(f"BPE with {vocab_size} pieces: {error}") from None
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        pieces = [processor.id_to_piece(i) for i in range(1, processor.get_piece_size())]
        return cls([BLANK, *pieces], model.getvalue())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; characters outside the alphabet are an error that names them."""
        if self.sentencepiece_model is None:
            if any(len(token) > 1 and token[0] != "<" for token in self.tokens):
                raise ValueError(
                    "the tokens are pieces of words, and the SentencePiece model that cuts texts "
                    "into them is not in this file: train.py --new_tokens gives the model others"
                )
            symbols = text.strip().replace(" ", SPACE)
            try:
                return [self._ids[c] for c in symbols]
            except KeyError:
                raise ValueError(self._complaint(text, set(symbols) - set(self._ids))) from None
        if self._processor is None:
            import sentencepiece

            self._processor = sentencepiece.SentencePieceProcessor(
                model_proto=self.sentencepiece_model
            )
        pieces: list[str] = self._processor.encode(text, out_type=str)
        try:
            return [self._ids[piece] for piece in pieces]
        except KeyError:
            known = set("".join(self.tokens[1:]))
            raise ValueError(self._complaint(text, set(text.replace(" ", SPACE)) - known)) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids that hold no blanks (see `asr.runtime.decoding`)."""
        tokens = [self.tokens[i] for i in ids]
        words = (join(tokens[start:end]) for start, end in word_spans(tokens))
        return " ".join(" ".join(words).split())

    @property
    def formatted(self) -> bool:
        """Whether texts have capital letters or punctuation, as those of some imported models."""
        letters = "".join(t for t in self.tokens if not t.startswith("<")).replace("'", "")
        return any(c.isupper() or unicodedata.category(c)[0] == "P" for c in set(letters) - {SPACE})

    @staticmethod
    def _complaint(text: str, unknown: set[str]) -> str:
        return (
            f"characters outside the alphabet: {' '.join(map(name_character, sorted(unknown)))} "
            f"in {text[:60]!r}; normalise the text or choose another --alphabet"
        )


def word_spans(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """First and end of each word: one begins with a space, or is unknown, or follows what is."""
    borders = [
        n for n in range(1, len(tokens))
        if tokens[n].startswith(SPACE) or UNKNOWN in tokens[n - 1 : n + 1]
    ]  # fmt: skip
    return list(pairwise([0, *borders, len(tokens)]))


def join(tokens: Iterable[str]) -> str:
    """The text of a word's tokens, without the space before it; bytes make characters."""
    text = "".join(WRITTEN.get(token, token) for token in tokens).replace(SPACE, " ").strip()
    return BYTES.sub(_characters, text) if "<0x" in text else text


def _characters(found: re.Match[str]) -> str:
    return bytes.fromhex(found[0].replace("<0x", "").replace(">", "")).decode("utf-8", "replace")
