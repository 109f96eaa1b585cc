"""The edge path: no torch, nothing of compress, little memory, and an installation of its own."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

from asr.runtime.recognizer import load

ROOT = Path(__file__).resolve().parents[1]
# what a device need not have: importing one of these fails
ABSENT = ("torch", "onnx", "jiwer", "scipy", "librosa", "sentencepiece", "sklearn", "tqdm")
MEMORY = 250e6  # bytes, the bound of the project
# ru_maxrss would count what the parent held
PEAK = """
def peak():
    line = next(x for x in open("/proc/self/status") if x.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
"""
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")


def run_python(code, *args, **more):
    """Runs code in a new process; its standard output as JSON."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + code, *map(str, args)],
        cwd=ROOT, capture_output=True, text=True, check=False, **more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_asr_imports_next_to_nothing():
    loaded = run_python("import asr, json; print(json.dumps(sorted(sys.modules)))")
    heavy = {"torch", "numpy", "onnxruntime", "soundfile", "compress", "asr.runtime.recognizer"}
    assert not {name for name in loaded if name in heavy and name not in ABSENT}


def test_an_onnx_model_is_run_without_torch_and_compress(tiny_onnx, clip):
    found = run_python(
        """
import asr, json
text = asr.load(sys.argv[1], threads=1, min_confidence=0).transcribe(sys.argv[2]).text
loaded = [name for name in sys.modules if sys.modules[name] is not None]
print(json.dumps([text, loaded]))
""",
        tiny_onnx, clip,
    )  # fmt: skip
    text, loaded = found
    assert text == load(tiny_onnx, min_confidence=0).transcribe(clip).text != ""
    packages = {name.partition(".")[0] for name in loaded}
    assert not packages & {*ABSENT, "compress"}
    rooms = {name.split(".")[1] for name in loaded if name.startswith("asr.")}
    assert rooms == {"runtime"}


def test_the_command_needs_no_torch(tiny_onnx, clip):
    code = """
import asr.runtime.transcribe, contextlib, io, json
out = io.StringIO()
with contextlib.redirect_stdout(out):
    flags = ["--model_path", sys.argv[1], "--min_confidence", "0", "--audio_path", sys.argv[2]]
    code = asr.runtime.transcribe.main(flags)
print(json.dumps([code, out.getvalue()]))
"""
    assert run_python(code, tiny_onnx, clip) == [
        0,
        load(tiny_onnx, min_confidence=0).transcribe(clip).text + "\n",
    ]


@pytest.fixture
def without(tmp_path):
    """The environment of a process that cannot import what is in ABSENT, nor can its children."""
    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_speed_is_measured_without_torch(tiny_onnx, tmp_path, without):
    flags = ["--threads", "1", "--rounds", "1", "--output_path", tmp_path / "r.json"]
    done = subprocess.run(
        [sys.executable, "scripts/benchmark.py", "infer", "--model_path", tiny_onnx, *flags],
        cwd=ROOT, env=without, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert row["latency"] > 0


def test_a_checkpoint_without_torch_is_one_line(tiny_checkpoint, clip, without):
    done = subprocess.run(
        [sys.executable, "transcribe.py", "--model_path", tiny_checkpoint, "--audio_path", clip],
        cwd=ROOT, env=without, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tiny_checkpoint}: needs PyTorch")
    assert done.stderr.count("\n") == 1


@on_linux
def test_memory_does_not_grow_with_the_recording(tiny_onnx):
    """Ten minutes read in one piece would need 2 GB for one block's attention."""
    code = """
import json
import numpy as np
from asr.runtime.recognizer import load
recognizer = load(sys.argv[1], threads=1)
noise = np.random.default_rng(0).standard_normal(600 * 16000, dtype=np.float32) / 10
peaks = []
for seconds in (60, 600):
    recognizer.transcribe(noise[: seconds * 16000])
    peaks.append(peak())
print(json.dumps(peaks))
"""
    short, long = run_python(PEAK + code, tiny_onnx)
    assert long - short < 60e6
    assert short < MEMORY


@on_linux
def test_memory_does_not_grow_with_the_lengths_there_were():
    """The runtime would keep a plan of its memory for each, of 30 kB and more."""
    code = """
import json
import numpy as np
from asr.runtime.recognizer import load
recognizer = load(threads=1, beam=False)
def grown(lengths):
    for n in lengths:
        recognizer.log_probs([np.zeros((n, recognizer.info.features.n_mels), np.float32)])
    return peak()
before = grown([200])
print(json.dumps(grown(range(40, 200)) - before))
"""
    assert run_python(PEAK + code) < 1.5e6


@pytest.mark.slow
def test_the_core_installs_alone_and_transcribes_in_any_folder(tmp_path):
    """The wheel holds the English model, which is a link in a checkout."""
    source, empty = tmp_path / "source", tmp_path / "empty"  # building writes into the folder
    for folder in (source, empty):
        folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("asr", "compress"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored, symlinks=True)
    for path in [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")]:
        shutil.copy(path, source)
    for link in (source / "asr" / "shipped").iterdir():
        target = link.parent / os.readlink(link)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / target.resolve().relative_to(source), target)
    venv.create(tmp_path / "venv", with_pip=True)
    scripts = tmp_path / "venv" / Path(sysconfig.get_path("scripts")).name
    install = subprocess.run(
        [scripts / "python", "-m", "pip", "install", "--quiet", source],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if install.returncode and "No matching distribution" in install.stderr:
        pytest.skip("no package registry at hand")
    assert install.returncode == 0, install.stderr
    shutil.rmtree(source)
    installed = {
        path.name.partition("-")[0].lower()
        for path in (tmp_path / "venv").glob("lib/python*/site-packages/*.dist-info")
    }
    assert {"conformer_asr_edge", "onnxruntime", "numpy", "soundfile", "soxr"} <= installed
    assert not installed & {"torch", "jiwer", "librosa", "tqdm"}

    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    audio = ROOT / "data" / "mini" / "test" / "af_bella" / "0000.opus"
    code = f"import asr; print(asr.load(threads=1).transcribe({str(audio)!r}))"
    for command in (["asr-transcribe", audio], ["python", "-c", code]):
        done = subprocess.run(
            [scripts / command[0], *command[1:]],
            cwd=empty, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == load(threads=1).transcribe(audio).text + "\n" != "\n"
    assert not list(empty.iterdir())


@pytest.mark.slow
def test_the_oldest_packages_that_are_admitted_run_the_shipped_files(tmp_path):
    """In an environment of their own; with others one would not see that the bounds have moved."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / Path(sysconfig.get_path("scripts")).name / "python"
    install = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *(x.replace(">=", "==") for x in needed)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if install.returncode and "No matching distribution" in install.stderr:
        pytest.skip("no package registry at hand, or no wheels for this Python")
    assert install.returncode == 0, install.stderr
    audio = ROOT / "data" / "mini" / "test" / "af_bella" / "0000.opus"
    models = [None, str(ROOT / "experiments" / "librispeech" / "model_int8.onnx")]
    code = (
        f"import asr\nfor m in {models}: print(asr.load(m, threads=1).transcribe({str(audio)!r}))"
    )
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    texts = [load(model, threads=1).transcribe(audio).text for model in models]
    assert done.stdout.splitlines() == texts
    assert all(texts)
