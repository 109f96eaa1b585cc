"""Writing files whole: to links, pipes, /dev/stdout, mounted files, without chmod."""

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from asr.runtime import files
from asr.runtime.files import check_writable, whole_file, write_atomically

ROOT = Path(__file__).parents[1]


def write(path, text="new"):
    check_writable(path)
    write_atomically(path, text)


def only(folder, *names):
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), whole_file(path) as file:
        file.write("half" * 10_000 + "\ud800")
    assert path.read_text() == "old"
    only(tmp_path, "a.txt")


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/target")
    for text in ("new", "newer"):  # a dangling one is filled
        write(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "there" / "target").read_text() == text
    only(tmp_path, "link", "there")
    only(tmp_path / "there", "target")


def test_all_names_of_a_file_get_it(tmp_path):
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_text("something old and longer")
    os.link(path, other)
    write(path)
    assert other.read_text() == "new"
    only(tmp_path, "a", "b")


def test_the_mode_stays_and_a_new_file_has_the_usual_one(tmp_path):
    path = tmp_path / "a"
    write(path)
    (tmp_path / "b").write_text("")
    assert path.stat().st_mode == (tmp_path / "b").stat().st_mode
    path.chmod(0o640)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_pipe_is_written_to(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read = []
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    write(path)
    reader.join()
    assert read == ["new"]
    assert stat.S_ISFIFO(path.stat().st_mode)
    only(tmp_path, "pipe")


def test_a_device_is_written_to():
    write("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_is_written_to_and_not_replaced(tmp_path, name):
    code = f"from asr.runtime.files import *; check_writable({name!r}); "
    code += f"print('a', flush=True); write_atomically({name!r}, 'new\\n'); print('b')"
    path = tmp_path / "out"
    path.write_text("old\n")
    with open(path, "a") as file:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=file, check=True)
    assert path.read_text() == "old\na\nnew\nb\n"
    only(tmp_path, "out")


def test_a_mounted_file_is_written_to(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("something old and longer")
    inode = path.stat().st_ino

    def busy(source, target):
        raise OSError(errno.EBUSY, "Device or resource busy", str(target))

    monkeypatch.setattr(os, "replace", busy)  # as a bind mount answers
    write(path)
    assert path.read_text() == "new"
    assert path.stat().st_ino == inode
    only(tmp_path, "a")


def test_a_folder_that_takes_no_files_keeps_its_own(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("something old and longer")
    make = files.tempfile.mkstemp

    def refuse(dir=None, **more):
        if dir is not None and Path(dir) == tmp_path:
            raise OSError(errno.EROFS, "Read-only file system")
        return make(dir=dir, **more)

    monkeypatch.setattr(files.tempfile, "mkstemp", refuse)
    write(path)
    assert path.read_text() == "new"
    with pytest.raises(ValueError, match="Read-only file system"):
        check_writable(tmp_path / "b")


def test_a_file_system_without_modes_is_fine(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    write(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "new"


def test_long_names_are_no_trouble(tmp_path):
    write(tmp_path / ("n" * 255))
    only(tmp_path, "n" * 255)
