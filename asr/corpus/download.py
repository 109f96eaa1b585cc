"""Fetching LibriSpeech: resumable HTTP download, MD5 check, unpacking that stays in its folder.

The archives and their sums are those of OpenSLR resource 12 (CC BY 4.0).
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

URL = "https://www.openslr.org/resources/12"
MD5 = {
    "dev-clean": "42e2234ba48799c1f50f24a7926300a1",
    "dev-other": "c8d0bcc9cca99d4f8b62fcc847357931",
    "test-clean": "32fa31d27d2e1cad72775fee3f4849a9",
    "test-other": "fb5a50374b501bb3bac4815ee91d3135",
    "train-clean-100": "2a93770f6d5c6c964bc36631d331a522",
    "train-clean-360": "c0e676e450a7ff2f54aeade5171606fa",
    "train-other-500": "d1a0fd59409feb2c614ce4d30c387708",
}
BLOCK = 1 << 20

Progress = Callable[[int, int], None]  # (bytes there, bytes in all)


class DownloadError(OSError):
    """A download or an archive that cannot be used; the message is one line for the user."""


def download_split(
    name: str,
    folder: str | Path,
    url: str = URL,
    progress: Progress | None = None,
    keep_archive: bool = False,
) -> Path:
    """Fetch and unpack the split `name`; returns its folder, `folder`/LibriSpeech/`name`.

    A split that is there already is left alone; an interrupted download goes on where it stopped.
    The split's folder appears only once it is complete; until then the disk holds the archive and
    the audio, about twice the archive's size. Raises DownloadError, OSError.
    """
    if name not in MD5:
        raise ValueError(f"no LibriSpeech split is named {name}; choose one of {', '.join(MD5)}")
    folder = Path(folder)
    target = folder / "LibriSpeech" / name
    if target.is_dir():
        return target
    archive = folder / f"{name}.tar.gz"
    if not archive.exists():
        fetch(f"{url.rstrip('/')}/{name}.tar.gz", archive, MD5[name], progress)
    elif file_md5(archive) != MD5[name]:
        raise DownloadError(f"{archive}: wrong MD5 sum; delete the file to download it again")
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as temporary:
        unpack(archive, temporary)
        unpacked = Path(temporary) / "LibriSpeech"
        if not (unpacked / name).is_dir():
            raise DownloadError(f"{archive}: no folder LibriSpeech/{name} in it; delete the file")
        target.parent.mkdir(parents=True, exist_ok=True)
        for extra in sorted(unpacked.iterdir()):  # README, LICENSE, SPEAKERS; the split comes last
            if extra.is_file():
                os.replace(extra, target.parent / extra.name)
        os.replace(unpacked / name, target)
    if not keep_archive:
        archive.unlink()
    return target


def fetch(
    url: str,
    path: str | Path,
    md5: str,
    progress: Progress | None = None,
    retries: int = 5,
    wait: float = 1.0,
    timeout: float = 60.0,
) -> None:
    """Download `url` to `path`, by way of `path`.part, and check its MD5 sum.

    A broken connection is taken up again where it stopped, `retries` times in a row without any
    progress, with pauses of `wait`, 2 `wait`, ... seconds; what is there stays for the next call.
    """
    path = Path(path)
    if not url.startswith(("https://", "http://")):
        raise DownloadError(f"{url}: not an http(s) address")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures = 0
    while True:
        before = _size(part)
        try:
            if _fetch_rest(url, part, progress, timeout):
                break
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise DownloadError(f"{url}: {error.code} {error.reason}") from None
            reason = f"{error.code} {error.reason}"
        except (
            urllib.error.URLError,
            http.client.HTTPException,
            ConnectionError,
            TimeoutError,
        ) as e:
            reason = str(getattr(e, "reason", e)) or type(e).__name__
        failures = 1 if _size(part) > before else failures + 1
        if failures > retries:
            raise DownloadError(
                f"{url}: {reason}, at {_size(part):,} bytes; the same command goes on from there"
            )
        time.sleep(wait * 2 ** (failures - 1))
    found = file_md5(part)
    if found != md5:
        part.unlink()
        raise DownloadError(
            f"{url}: MD5 sum {found} instead of {md5}; the file was removed, download it again"
        )
    os.replace(part, path)


def file_md5(path: str | Path) -> str:
    """MD5 sum of a file, in hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def unpack(archive: str | Path, folder: str | Path) -> None:
    """Unpack a .tar.gz of plain files and folders into `folder`.

    An absolute path, a path with `..`, a link or a device refuses the archive at that point.
    Raises DownloadError.
    """
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                target = _safe_path(member, Path(folder), archive)
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                content = tar.extractfile(member)
                assert content is not None  # _safe_path lets only files and folders through
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "xb") as file:
                    shutil.copyfileobj(content, file, BLOCK)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DownloadError(f"{archive}: damaged archive ({error}); delete it and retry") from None
    except FileExistsError as error:
        raise DownloadError(f"{archive}: {error.filename} stands twice in it") from None


def _safe_path(member: tarfile.TarInfo, folder: Path, archive: str | Path) -> Path:
    name = PurePosixPath(member.name)
    leaves = name.is_absolute() or ".." in name.parts or "\\" in member.name or ":" in member.name
    if leaves or not (member.isreg() or member.isdir()):
        kind = "a path out of the folder" if leaves else "neither a file nor a folder"
        raise DownloadError(f"{archive}: refused, {member.name!r} is {kind}")
    return folder / name


def _fetch_rest(url: str, part: Path, progress: Progress | None, timeout: float) -> bool:
    """Append to `part` what it lacks; True if it is complete."""
    start = _size(part)
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        whole = error.headers.get("Content-Range", "").rpartition("/")[2]
        if whole == str(start):
            return True
        part.unlink()  # longer than the file there: not a part of it
        return False
    with response:
        if response.status != 206:
            start = 0  # no Range support: from the beginning
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise http.client.HTTPException("the server answered with another range")
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else 0
        free = shutil.disk_usage(part.parent).free
        if total - start > free:
            raise DownloadError(
                f"{part}: needs {total - start:,} bytes, {free:,} are free on the disk"
            )
        with open(part, "ab" if start else "wb") as file:
            there = start
            while block := response.read(BLOCK):
                try:
                    file.write(block)
                except OSError as error:
                    raise DownloadError(f"{part}: {error.strerror}; make room and retry") from None
                there += len(block)
                if progress:
                    progress(there, total)
    return not total or there == total


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
