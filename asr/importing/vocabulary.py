"""The tokens of a NeMo model: its blank is the last row of the head, ours the first.

One rule fits characters and SentencePiece: rows 0 and V change places, so that every other piece
keeps its id and the unknown piece, or whatever was first, stands at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from asr.importing.archive import Archive, ArchiveError, one_line
from asr.runtime.tokenizer import BLANK, SPACE, Tokenizer

SPECIAL = {"[UNK]": "<unk>", "[PAD]": "<pad>", "[CLS]": "<s>", "[SEP]": "</s>"}  # WordPiece's


@dataclass
class Vocabulary:
    """Our tokenizer, and for each of its tokens the row of the other head that it had."""

    tokenizer: Tokenizer
    rows: list[int]
    notes: list[str] = field(default_factory=list)


def blank_first(
    pieces: list[str], model: bytes | None = None, first: int = 0, blank: int | None = None
) -> Vocabulary:
    """`pieces` that stand at the rows from `first` on, the blank at `blank` (default: after them).

    ValueError for tokens that cannot be told apart.
    """
    blank = len(pieces) if blank is None else blank
    tokens = [BLANK, *pieces[1:], pieces[0]]
    rows = [blank, *range(first + 1, first + len(pieces)), first]
    return Vocabulary(Tokenizer(tokens, model), rows)


def read_vocabulary(
    archive: Archive, config: dict[str, Any], listed: list[str], language: str = ""
) -> Vocabulary:
    """The vocabulary of an archive whose yaml lists `listed`; of several languages, one.

    Raises ArchiveError for tokens that cannot be used, and for a `language` that is not there or
    was not named.
    """
    tokenizer = config.get("tokenizer") or {}
    kind = str(tokenizer.get("type", "char")) if isinstance(tokenizer, dict) else "char"
    languages = tokenizer.get("langs") if isinstance(tokenizer, dict) else None
    try:
        if isinstance(languages, dict) and languages:
            return _one_language(archive, config, languages, listed, language)
        if language:
            raise ArchiveError(f"--language {language}: this model has one set of tokens")
        if kind == "wpe":
            return _word_pieces(listed)
        if kind == "bpe":
            model = _model(archive, tokenizer)
            vocabulary = blank_first(listed, model)
            if model is None:
                vocabulary.notes.append("no tokenizer.model: it can be run, not trained further")
            elif pieces_of(model) != listed:
                raise ArchiveError("tokenizer.model and decoder.vocabulary differ")
            return vocabulary
        if kind == "char":
            return blank_first([SPACE if t == " " else t for t in listed])
    except ValueError as error:
        if isinstance(error, ArchiveError):
            raise
        raise ArchiveError(f"its vocabulary cannot be used: {error}") from None
    raise ArchiveError(
        f"model_config.yaml: tokenizer.type: {kind[:40]!r} is not one of bpe, wpe, char, agg"
    )


def _word_pieces(listed: list[str]) -> Vocabulary:
    """`##ing` goes on with a word, everything else begins one."""
    pieces = [
        SPECIAL.get(t) or (t.removeprefix("##") if t.startswith("##") else SPACE + t)
        for t in listed
    ]
    vocabulary = blank_first(pieces)
    vocabulary.notes.append("WordPiece tokens: it can be run, not trained further")
    return vocabulary


def _one_language(
    archive: Archive, config: dict[str, Any], languages: dict[str, Any], listed: list[str],
    language: str,
) -> Vocabulary:  # fmt: skip
    """The rows of one language and the blank, the last row; the softmax is over them alone."""
    if language not in languages:
        raise ArchiveError(
            "has several languages; name one with --language: "
            f"{', '.join(map(str, languages))[:300]}"
        )
    first = 0
    for name, part in languages.items():
        model = _model(archive, part if isinstance(part, dict) else {})
        if model is not None:
            size = len(pieces_of(model))
        else:
            size = len(listed) // len(languages)
            if len(listed) % len(languages):
                raise ArchiveError(f"model_config.yaml: tokenizer.langs.{name}: has no model_path")
        if name == language:
            break
        first += size
    pieces = pieces_of(model) if model is not None else listed[first : first + size]
    if listed[first : first + size] != pieces:
        raise ArchiveError(
            f"model_config.yaml: tokenizer.langs.{language}: its pieces are not those of "
            f"decoder.vocabulary from {first} on"
        )
    vocabulary = blank_first(pieces, model, first, len(listed))
    vocabulary.notes.append(f"{language}: {size} of {len(listed)} tokens of all languages are kept")
    return vocabulary


def _model(archive: Archive, tokenizer: dict[str, Any]) -> bytes | None:
    """The SentencePiece file that the yaml names; early archives have one without a name."""
    name = PurePath(
        str(tokenizer.get("model_path") or "tokenizer.model").removeprefix("nemo:")
    ).name
    return archive.read(name) if name in archive.names() else None


def pieces_of(model: bytes) -> list[str]:
    """The pieces of a SentencePiece model in the order of their ids."""
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    except (RuntimeError, ValueError, IndexError, UnicodeDecodeError) as error:
        raise ArchiveError(f"tokenizer.model is damaged: {one_line(error)}") from None
