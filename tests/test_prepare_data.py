"""scripts/prepare_data.py in process: what is kept or left out, and downloads from a server."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import wave
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr.corpus import download, prepare
from asr.corpus.manifest import read_manifest
from asr.corpus.splits import find_sources, load_splits

main = import_module("scripts.prepare_data").main
ROOT = Path(__file__).parents[1]
CORPORA = Path(os.environ.get("ASR_CORPORA", ROOT / ".." / "shared"))


def write_audio(path, seconds=1.0, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(0).integers(-9999, 9999, int(16000 * seconds), dtype=np.int16)
    soundfile.write(path, samples, 16000, **more)
    return samples


@pytest.fixture
def messy(tmp_path):
    """A split folder with one utterance for every reason to leave one out, and two good ones."""
    place = tmp_path / "LibriSpeech" / "train-x" / "7" / "1"
    texts = {
        "good": "HELLO WORLD",
        "also-good": "YES",
        "silent": "",
        "digits": "ROOM 101!",
        "fast": "A" * 30,
        "short": "A",
        "long": "A",
        "broken": "A",
        "gone": "A",
    }
    for name in [*texts, "unwritten"]:
        write_audio(place / f"{name}.flac", {"short": 0.05, "long": 36.0}.get(name, 1.0))
    (place / "gone.flac").unlink()
    (place / "broken.flac").write_bytes(b"no audio")
    lines = [f"{name} {text}\n" for name, text in texts.items()]
    (place / "7-1.trans.txt").write_text("".join(lines))
    return tmp_path / "LibriSpeech" / "train-x"


def test_what_is_left_out(messy, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["--data_dir", str(messy), "--output_dir", str(out)]) == 0
    assert [u.id for u in read_manifest(out / "train-x.json")] == ["also-good", "good"]
    rows = [line.split("\t") for line in (out / "train-x.left_out.tsv").read_text().splitlines()]
    assert rows[0] == ["id", "reason", "detail", "audio_filepath", "text"]
    assert {row[0]: row[1] for row in rows[1:]} == {
        "broken": "unreadable audio",
        "digits": "characters outside the alphabet",
        "fast": "text longer than the frames",
        "gone": "missing audio",
        "long": "duration out of range",
        "short": "duration out of range",
        "silent": "empty text",
        "unwritten": "no transcript",
    }
    printed = capsys.readouterr()
    assert "train-x: 2 utterances, 0.00 h, 1 speakers" in printed.out
    assert "2 duration out of range: long (36.00 s); short (0.05 s)" in printed.out
    assert "characters outside the alphabet [! 0 1]: digits (! 0 1)" in printed.out
    assert "59 needed, 26 there" in printed.out  # 101 frames, halved twice and rounded up
    assert printed.err == ""


def test_options_change_the_rules(messy, tmp_path, capsys):
    out = tmp_path / "out"
    rules = ["--alphabet", "abcdefghijklmnopqrstuvwxyz10!", "--max_duration", "40"]
    rules += ["--min_duration", "0.01", "--subsampling_factor", "2"]
    assert main(["--data_dir", str(messy), "--output_dir", str(out), *rules]) == 0
    kept = {u.id for u in read_manifest(out / "train-x.json")}
    assert kept == {"also-good", "digits", "good", "long", "short"}
    assert "51 there" in capsys.readouterr().out


def test_frames_against_counting():
    # one frame every 160 samples, the first on sample 0; each stride-2 convolution rounds up
    for samples in (1600, 16000, 16159, 16160, 23456):
        frames = len(range(0, samples + 1, 160))
        frames = len(range(0, len(range(0, frames, 2)), 2))
        assert prepare.output_frames(samples / 16000) == frames
    # CTC needs a blank between equal letters
    assert [prepare.needed_frames(x) for x in ("", "a", "abc", "aab", "aaa")] == [0, 1, 3, 4, 5]


def test_frames_against_the_loss():
    torch = pytest.importorskip("torch")
    for text, frames in (("abc", 3), ("aab", 4), ("aaa", 5)):
        target = torch.tensor([[1 + ord(c) - ord("a") for c in text]])
        for available in (frames - 1, frames):
            log_probs = torch.zeros(available, 1, 4).log_softmax(-1)
            lengths = torch.tensor([available]), torch.tensor([len(text)])
            loss = torch.nn.functional.ctc_loss(log_probs, target, *lengths)
            assert bool(loss.isfinite()) == (available >= frames)


def test_wav_copies(tmp_path):
    samples = write_audio(tmp_path / "in" / "a b.flac", 0.5)
    write_audio(tmp_path / "in" / "c.ogg", 0.5, format="OGG", subtype="OPUS")
    write_audio(tmp_path / "in" / "stereo" / "c.wav", 0.5)
    entries = [("a b.flac", "x/../.."), ("c.ogg", ""), ("stereo/c.wav", "")]
    manifest = tmp_path / "in" / "train.json"
    lines = [
        {"audio_filepath": name, "duration": 3, "text": "Hi", "speaker": speaker}
        for name, speaker in entries
    ]
    manifest.write_text("\n".join(json.dumps(line) for line in lines))
    out = tmp_path / "out"
    arguments = ["--data_dir", str(manifest), "--output_dir", str(out), "--to_wav"]
    assert main(arguments) == 0
    utterances = read_manifest(out / "train.json")
    written = [Path(u.audio_filepath).relative_to(out).as_posix() for u in utterances]
    assert written[1:] == ["wav/train/unknown/c.wav", "wav/train/unknown/c-2.wav"]
    assert len(Path(written[0]).parts) == 4  # whatever the speaker's name holds
    assert "wav/train" in json.loads((out / "train.json").read_text().splitlines()[0]).get(
        "audio_filepath"
    )  # relative, so that the folder can be moved
    with wave.open(utterances[0].audio_filepath) as file:
        assert file.getparams()[:4] == (1, 2, 16000, 8000)
        np.testing.assert_array_equal(np.frombuffer(file.readframes(9999), "<i2"), samples)
    assert [u.duration for u in utterances] == [0.5, 0.5, 0.5]  # not what the manifest said
    assert [u.id for u in utterances] == ["a b", "c", "c"]
    assert not list(out.rglob("*.tmp"))


def test_splits_lie_side_by_side(tmp_path):
    root, out = tmp_path / "LibriSpeech", tmp_path / "out"
    for split, speaker in (("train-a", "1"), ("dev-a", "2"), ("test-a", "3")):
        write_audio(root / split / speaker / "1" / "u.wav")
        (root / split / speaker / "1" / "x.trans.txt").write_text("u HELLO\n")
    assert main(["--data_dir", str(root / "train-a"), "--output_dir", str(out)]) == 0
    assert main(["--data_dir", str(root / "dev-a"), "--output_dir", str(out)]) == 0
    splits = load_splits(out)
    assert (len(splits.train), len(splits.dev), splits.notes) == (1, 1, [])
    assert main(["--data_dir", str(root), "--output_dir", str(out)]) == 0
    assert list(find_sources(out)) == ["dev-a", "test-a", "train-a"]


def test_equal_names_get_their_folder(tmp_path):
    for corpus in ("one", "two"):
        write_audio(tmp_path / corpus / f"{corpus}.wav")
        line = json.dumps({"audio_filepath": f"{corpus}.wav", "duration": 1, "text": "a"})
        (tmp_path / corpus / "train.json").write_text(line)
    out = tmp_path / "out"
    sources = [str(tmp_path / "one"), str(tmp_path / "two" / "train.json")]
    assert main(["--data_dir", sources[0], "--data_dir", sources[1], "--output_dir", str(out)]) == 0
    assert sorted(p.name for p in out.glob("*.json")) == ["train-one.json", "train-two.json"]
    assert main(["--data_dir", sources[0], sources[0], "--output_dir", str(out)]) == 2


def test_decode_finds_damage_behind_the_header(tmp_path):
    path = tmp_path / "train" / "1" / "1" / "a.flac"
    write_audio(path, 3.0)
    write_audio(path.with_name("b.flac"))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    (path.parent / "x.trans.txt").write_text("a HELLO\nb HELLO\n")
    for flags, kept in ([], 2), (["--decode"], 1):
        assert (
            main(["--data_dir", str(tmp_path / "train"), "--output_dir", str(tmp_path), *flags])
            == 0
        )
        assert len(read_manifest(tmp_path / "train.json")) == kept


def test_histogram_of_any_values():
    rng = np.random.default_rng(0)
    for values in ([3.0], [0.0, 0.0], [1e-3, 40.0], [11.0, 11.5], rng.uniform(1, 17, 500)):
        lines = prepare.histogram("seconds", np.asarray(values))
        counts = [int(x) for x in re.findall(r"– \S+ +(\d+)", "\n".join(lines))]
        assert len(counts) == len(lines) - 1
        assert sum(counts) == len(values)
        assert len(counts) <= 22
        assert max(line.count("#") for line in lines[1:]) == 40


ERRORS = {
    "nothing given": [],
    "missing": ["--data_dir", "{tmp}/none"],
    "nothing there": ["--data_dir", "{tmp}/folder"],
    "broken line": ["--data_dir", "{tmp}/broken.json"],
    "nothing left": ["--data_dir", "{tmp}/digits.json"],
    "output is a file": ["--data_dir", "{tmp}/good.json", "--output_dir", "{tmp}/good.json"],
    "onto itself": ["--data_dir", "{tmp}/good.json", "--output_dir", "{tmp}"],
    "no alphabet": ["--data_dir", "{tmp}/good.json", "--alphabet", " "],
    "durations": ["--data_dir", "{tmp}/good.json", "--min_duration", "9", "--max_duration", "1"],
    "workers": ["--data_dir", "{tmp}/good.json", "--num_workers", "0"],
    "factor": ["--data_dir", "{tmp}/good.json", "--subsampling_factor", "3"],
    "no such split": ["--download", "train-dirty"],
    "scheme": ["--download", "dev-clean", "--download_url", "file:///"],
}


@pytest.mark.parametrize("arguments", ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments):
    (tmp_path / "folder").mkdir()
    write_audio(tmp_path / "a.wav")
    good = {"audio_filepath": "a.wav", "duration": 1, "text": "hello"}
    (tmp_path / "good.json").write_text(json.dumps(good))
    (tmp_path / "broken.json").write_text(json.dumps(good) + "\n{")
    (tmp_path / "digits.json").write_text(json.dumps({**good, "text": "12"}))
    before = sorted(tmp_path.rglob("*.*"))
    monkeypatch.chdir(tmp_path)
    assert main([x.replace("{tmp}", str(tmp_path)) for x in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*.*")) == before


def test_disk_full(tmp_path):
    write_audio(tmp_path / "a.wav")
    line = json.dumps({"audio_filepath": "a.wav", "duration": 1, "text": "hello"}) + "\n"
    (tmp_path / "train.json").write_text(line * 500)
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
        "from scripts.prepare_data import main; sys.exit(main())"
    )
    for flags in [], ["--to_wav"]:
        result = subprocess.run(
            [sys.executable, "-c", code, "--data_dir", "train.json", "--output_dir", "out", *flags],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert [p.name for p in (tmp_path / "out").rglob("*.*")] in ([], ["train.left_out.tsv"])


def test_the_demo_replaces_only_what_is_its_own(tmp_path):
    """A copy of it, with a python that does nothing."""
    python = tmp_path / ".venv" / "bin" / "python"
    for folder in (python.parent, tmp_path / "scripts", tmp_path / "mine"):
        folder.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    (tmp_path / "data").symlink_to(ROOT / "data")
    demo = tmp_path / "scripts" / "demo.sh"
    demo.write_text((ROOT / "scripts" / "demo.sh").read_text())

    def run(*argv):
        return subprocess.run(["bash", demo, *argv], capture_output=True, text=True, check=False)

    (tmp_path / "mine" / "thesis.txt").touch()
    refused = run("mine")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "mine: " in refused.stderr
    assert (tmp_path / "mine" / "thesis.txt").exists()
    for argv in ((), (), ("new",), ("new",)):
        assert run(*argv).returncode == 0
        old = tmp_path / (argv[0] if argv else "runs/demo") / "old"
        assert not old.exists()
        old.touch()


def test_help_runs_as_a_script():
    script = ROOT / "scripts" / "prepare_data.py"
    result = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert "--data_dir" in result.stdout


# ---------------------------------------------------------------------------------- downloads


class Server(ThreadingHTTPServer):
    """Serves `files`; can ignore Range, fail, or hang up after some bytes, as `plan` says."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.plan, self.requests = {}, [], []
        self.ranges = True
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.requests.append(asked)
        step = self.server.plan.pop(0) if self.server.plan else None
        data = self.server.files.get(self.path)
        if data is None or step in (500, 503):
            self.send_error(step or 404)
            return
        start = int(asked[6:-1]) if asked and self.server.ranges else 0
        if start and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        end = start + step if step else len(data)
        self.wfile.write(data[start:end])


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


DATA = np.random.default_rng(0).bytes(300_000)
SUM = hashlib.md5(DATA).hexdigest()


@pytest.fixture
def blob(server):
    server.files["/blob"] = DATA
    return f"{server.url}/blob"


def test_fetch_takes_up_again(server, blob, tmp_path):
    seen = []
    server.plan = [100_000, 503, 50_000]
    download.fetch(blob, tmp_path / "x", SUM, lambda *there: seen.append(there), wait=0.01)
    assert (tmp_path / "x").read_bytes() == DATA
    assert server.requests == [None, "bytes=100000-", "bytes=100000-", "bytes=150000-"]
    assert seen[-1] == (300_000, 300_000)
    assert os.listdir(tmp_path) == ["x"]


def test_fetch_goes_on_in_the_next_call(server, blob, tmp_path):
    server.plan = [100_000, 500, 500, 500]
    with pytest.raises(download.DownloadError, match=r"500 .* 100,000 bytes.* goes on"):
        download.fetch(blob, tmp_path / "x", SUM, retries=2, wait=0.01)
    assert os.listdir(tmp_path) == ["x.part"]
    server.plan = []
    download.fetch(blob, tmp_path / "x", SUM)
    assert server.requests[-1] == "bytes=100000-"
    assert (tmp_path / "x").read_bytes() == DATA


def test_fetch_without_ranges(server, blob, tmp_path):
    server.ranges = False
    (tmp_path / "x.part").write_bytes(b"whatever was there")
    download.fetch(blob, tmp_path / "x", SUM)
    assert (tmp_path / "x").read_bytes() == DATA


@pytest.mark.parametrize("extra", [b"", b"more"])
def test_fetch_with_a_full_part(server, blob, tmp_path, extra):
    (tmp_path / "x.part").write_bytes(DATA + extra)
    download.fetch(blob, tmp_path / "x", SUM, wait=0.01)
    assert (tmp_path / "x").read_bytes() == DATA
    assert len(server.requests) == (2 if extra else 1)


def test_fetch_checks_the_sum(server, blob, tmp_path):
    with pytest.raises(download.DownloadError, match="MD5 sum"):
        download.fetch(blob, tmp_path / "x", "0" * 32)
    assert os.listdir(tmp_path) == []


def test_fetch_errors(server, blob, tmp_path, monkeypatch):
    with pytest.raises(download.DownloadError, match="404"):
        download.fetch(f"{server.url}/none", tmp_path / "x", SUM, wait=0.01)
    assert len(server.requests) == 1  # no use in asking again
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 1000}))
    with pytest.raises(download.DownloadError, match="300,000 bytes, 1,000 are free"):
        download.fetch(blob, tmp_path / "x", SUM, wait=0.01)
    server.server_close()
    with pytest.raises(download.DownloadError, match="at 0 bytes"):
        download.fetch("http://127.0.0.1:9/x", tmp_path / "y", SUM, retries=1, wait=0.01)
    assert os.listdir(tmp_path) == []


def archive(members):
    """The bytes of a .tar.gz of `(TarInfo or name, content)`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def split(server, tmp_path, monkeypatch):
    audio = tmp_path / "made.flac"
    write_audio(audio)
    data = archive(
        [
            ("LibriSpeech/README.TXT", b"about"),
            ("LibriSpeech/dev-clean/1/2/1-2-0000.flac", audio.read_bytes()),
            ("LibriSpeech/dev-clean/1/2/1-2.trans.txt", b"1-2-0000 HELLO WORLD\n"),
        ]
    )
    audio.unlink()
    server.files["/dev-clean.tar.gz"] = data
    monkeypatch.setitem(download.MD5, "dev-clean", hashlib.md5(data).hexdigest())
    monkeypatch.chdir(tmp_path)
    return ["--download", "dev-clean", "--download_url", server.url]


def test_download_and_prepare(server, split, tmp_path, capsys):
    server.plan = [500]
    assert main(split) == 0  # with the default folders
    data = tmp_path / "data"
    assert sorted(p.name for p in data.iterdir()) == ["LibriSpeech"]
    assert (data / "LibriSpeech" / "README.TXT").read_text() == "about"
    (utterance,) = read_manifest(data / "LibriSpeech" / "dev-clean.json")
    assert (utterance.text, utterance.speaker, utterance.duration) == ("hello world", "1", 1.0)
    manifest = (data / "LibriSpeech" / "dev-clean.json").read_text()
    assert json.loads(manifest)["audio_filepath"] == "dev-clean/1/2/1-2-0000.flac"
    count = len(server.requests)
    assert main([*split, "--keep_archive"]) == 0  # what is there is not fetched again
    assert len(server.requests) == count
    assert capsys.readouterr().err == ""


def test_an_archive_that_lies_there_is_checked(server, split, tmp_path, capsys):
    path = tmp_path / "data" / "dev-clean.tar.gz"
    path.parent.mkdir()
    path.write_bytes(b"something else")
    assert main(split) == 2
    assert "wrong MD5" in capsys.readouterr().err
    path.write_bytes(server.files["/dev-clean.tar.gz"])
    assert main([*split, "--keep_archive"]) == 0
    assert server.requests == []
    assert path.exists()


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


EVIL = {
    "parent": [("LibriSpeech/../../evil", b"x")],
    "absolute": [("/tmp/evil-member", b"x")],
    "backslash": [("LibriSpeech\\..\\..\\evil", b"x")],
    "drive": [("C:/evil", b"x")],
    "symlink": [(special("LibriSpeech/a", tarfile.SYMTYPE, "../../.."), b"")],
    "inner symlink": [(special("LibriSpeech/a", tarfile.SYMTYPE, "b"), b"")],
    "hard link": [(special("LibriSpeech/a", tarfile.LNKTYPE, "/etc/passwd"), b"")],
    "through a link": [(special("a", tarfile.SYMTYPE, ".."), b""), ("a/evil", b"x")],
    "device": [(special("LibriSpeech/a", tarfile.CHRTYPE), b"")],
    "fifo": [(special("LibriSpeech/a", tarfile.FIFOTYPE), b"")],
    "twice": [("LibriSpeech/a", b"x"), ("LibriSpeech/a", b"y")],
    "file as folder": [("LibriSpeech/a", b"x"), ("LibriSpeech/a/b", b"y")],
    "another split": [("LibriSpeech/dev-other/1", b"x")],
}


@pytest.mark.parametrize("members", EVIL.values(), ids=EVIL)
def test_evil_archives(server, split, tmp_path, monkeypatch, capsys, members):
    data = archive([("LibriSpeech/dev-clean/1/2/x.trans.txt", b"a B\n")][: len(members)] + members)
    if members == EVIL["another split"]:
        data = archive(members)
    server.files["/dev-clean.tar.gz"] = data
    monkeypatch.setitem(download.MD5, "dev-clean", hashlib.md5(data).hexdigest())
    assert main(split) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: data")
    assert printed.count("\n") == 1
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == [
        "data",
        "data/dev-clean.tar.gz",
    ]


@pytest.mark.parametrize("damage", [slice(0, 300), slice(100, None), slice(0, -500)])
def test_damaged_archives(server, split, tmp_path, monkeypatch, capsys, damage):
    data = server.files["/dev-clean.tar.gz"][damage]
    server.files["/dev-clean.tar.gz"] = data
    monkeypatch.setitem(download.MD5, "dev-clean", hashlib.md5(data).hexdigest())
    assert main(split) == 2
    assert "damaged archive" in capsys.readouterr().err
    assert not (tmp_path / "data" / "LibriSpeech").exists()


@pytest.mark.skipif(not (CORPORA / "LibriSpeech").is_dir(), reason="no real speech: ASR_CORPORA")
def test_real_speech(tmp_path, capsys):
    arguments = ["--data_dir", str(CORPORA / "LibriSpeech" / "dev-clean")]
    assert main([*arguments, "--output_dir", str(tmp_path)]) == 0
    assert "left out: 0" in capsys.readouterr().out
    assert len(read_manifest(tmp_path / "dev-clean.json")) > 100
