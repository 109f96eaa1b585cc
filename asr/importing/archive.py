"""A .nemo file: a tar (plain or gzip) or a folder with a yaml, weights and a tokenizer.

Nothing is unpacked to disk and nothing in it is run. A file that somebody else made may be damaged
or made to harm, so what it claims is checked against what is there: memory stays within a few
times the size of the file, and every fault is an `ArchiveError` of one line.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import torch
import yaml
from torch import Tensor

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
MOST_MEMBERS = 10_000
MOST_TEXT = 16 * 2**20  # bytes of a yaml or a tokenizer
GZIP_GROWTH, GZIP_SPARE = 4, 64 * 2**20  # weights hardly pack: what unpacks to more is a bomb


class ArchiveError(ValueError):
    """A file that is no usable archive, or one with a model that cannot be expressed here."""


class Archive:
    """The members of an archive by base name; open with `open_archive`."""

    def __init__(self, members: dict[str, Any], tar: tarfile.TarFile | None = None) -> None:
        self._members = members  # a Path each in a folder, a TarInfo each in a tar
        self._tar = tar

    def names(self) -> list[str]:
        return list(self._members)

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """The member as a file that can be sought in; ArchiveError if there is none."""
        member = self._members.get(name)
        if member is None:
            raise ArchiveError(f"holds no {name}; {self._contents()}")
        if self._tar is None:
            with open(member, "rb") as file:
                yield file
        else:
            with cast(IO[bytes], self._tar.extractfile(member)) as file:
                yield file

    def read(self, name: str) -> bytes:
        """The bytes of a small member."""
        with self.open(name) as file:
            data = file.read(MOST_TEXT + 1)
        if len(data) > MOST_TEXT:
            raise ArchiveError(f"{name} is larger than {MOST_TEXT >> 20} MB")
        return data

    def _contents(self) -> str:
        names = sorted(self._members)
        if not names:
            return "it is empty"
        return f"there is {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}"


@contextmanager
def open_archive(path: str | Path) -> Iterator[Archive]:
    """The archive at `path`; errors of damaged files while it is open become ArchiveErrors."""
    path = Path(path)
    if not path.exists():
        raise ArchiveError("no such file; name a .nemo archive, a folder or an .onnx file")
    try:
        if path.is_dir():
            yield Archive({p.name: p for p in path.iterdir() if p.is_file()})
            return
        with (
            open(path, "rb") as file,
            _plain(file) as (stream, limit),
            tarfile.open(fileobj=stream, mode="r:") as tar,
        ):
            yield Archive(_members(tar, limit), tar)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ArchiveError(
            f"not a whole .nemo archive (a tar, plain or gzip): {one_line(error)}"
        ) from None


@contextmanager
def _plain(file: IO[bytes]) -> Iterator[tuple[IO[bytes], int]]:
    """The tar as a stream, and the most bytes that may be in it; a gzip one is bounded by that."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    if not packed:
        yield file, size
        return
    limit = GZIP_GROWTH * size + GZIP_SPARE
    with (
        gzip.GzipFile(fileobj=file) as stream,
        io.BufferedReader(_Bounded(stream, limit)) as bounded,
    ):
        yield bounded, limit


class _Bounded(io.RawIOBase):
    """A stream of which only the first `limit` bytes may be read."""

    def __init__(self, stream: gzip.GzipFile, limit: int) -> None:
        self._stream, self._limit = stream, limit

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(min(len(buffer), 2**20))
        self._check(self._stream.tell())
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == io.SEEK_END:
            raise ArchiveError("a damaged gzip archive")
        self._check(offset + (self._stream.tell() if whence else 0))
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def _check(self, position: int) -> None:
        if position > self._limit:
            raise ArchiveError(
                f"unpacks to more than {self._limit >> 20} MB, which no archive of "
                "weights does; it is damaged or made to fill the memory"
            )


def _members(tar: tarfile.TarFile, limit: int) -> dict[str, tarfile.TarInfo]:
    """Plain files inside the archive, by base name; links, devices and outward paths are not."""
    members: dict[str, tarfile.TarInfo] = {}
    for number, member in enumerate(tar):
        if number == MOST_MEMBERS:
            raise ArchiveError(f"more than {MOST_MEMBERS:,} members: no .nemo archive")
        place = PurePosixPath(member.name)
        if not member.isreg() or member.issparse() or place.is_absolute() or ".." in place.parts:
            continue
        if member.offset_data + member.size > limit:
            raise ArchiveError(f"{place.name} is cut: the archive ends before it does")
        if place.name in members:
            raise ArchiveError(
                f"holds several {place.name}: a model-parallel archive? Join it with NeMo"
            )
        members[place.name] = member
    return members


def read_yaml(archive: Archive) -> dict[str, Any]:
    """model_config.yaml as plain dicts and lists; what stands under `model:` if that is there."""
    where = CONFIG
    data = archive.read(CONFIG)
    try:
        text = data.decode("utf-8")
        loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        for event in yaml.parse(text, Loader=loader):
            if isinstance(event, yaml.AliasEvent):  # a few of them can stand for gigabytes
                raise ArchiveError(f"{where} uses yaml aliases, which NeMo does not write")
        config = yaml.load(text, Loader=loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, ArchiveError):
            raise
        raise ArchiveError(f"{where} is not a yaml file: {one_line(error)}") from None
    if isinstance(config, dict) and isinstance(config.get("model"), dict):
        config = config["model"]
    if not isinstance(config, dict):
        raise ArchiveError(f"{where} is not a list of settings")
    return config


def read_weights(archive: Archive) -> dict[str, Tensor]:
    """The state dict of model_weights.ckpt; weights only, whatever else its pickle asks for."""
    where = WEIGHTS
    with archive.open(WEIGHTS) as file:
        size = _check_zip(file, where)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise ArchiveError(f"{where} is unsafe to load: it would run code") from None
        except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, ArchiveError):
            raise
        except MemoryError:
            raise ArchiveError(f"{where} claims more than the memory holds") from None
        except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
            raise ArchiveError(f"{where} is damaged: {one_line(error)}") from None
    return checked_tensors(state, where, size)


def _check_zip(file: IO[bytes], where: str) -> int:
    """Bytes of a torch file whose records are stored as they are: none can grow on reading."""
    try:
        with zipfile.ZipFile(file) as contents:
            records = contents.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise ArchiveError(
            f"{where} is cut, damaged, or older than PyTorch 1.6: {one_line(error)}"
        ) from None
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    if not stored or sum(record.file_size for record in records) > size:
        raise ArchiveError(f"{where} has records that torch does not write: damaged or harmful")
    return size


def checked_tensors(state: Any, where: str, size: int) -> dict[str, Tensor]:
    """The state as names and plain tensors that hold what they claim; ArchiveError otherwise."""
    if not isinstance(state, dict) or not all(type(name) is str for name in state):
        raise ArchiveError(f"{where} holds no state dict")
    for name, x in state.items():
        if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_quantized or x.is_meta:
            raise ArchiveError(f"{where}: {name[:80]!r} is not a plain tensor")
        if x.untyped_storage().nbytes() < x.nbytes:  # strides of 0 make much of little
            raise ArchiveError(f"{where}: {name[:80]!r} claims more than it holds")
    if sum(x.nbytes for x in state.values()) > 2 * size + 2**20:
        raise ArchiveError(f"{where}: its tensors claim more than the file holds")
    return {name: x.detach() for name, x in state.items()}


def one_line(error: BaseException) -> str:
    """What an error says, short."""
    return " ".join(str(error).split())[:160] or type(error).__name__
