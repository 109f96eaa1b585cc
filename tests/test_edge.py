"""The edge path: no torch, nothing of compress, little memory, and an installation of its own."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
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
text = asr.load(sys.argv[1], threads=1).transcribe(sys.argv[2]).text
loaded = [name for name in sys.modules if sys.modules[name] is not None]
print(json.dumps([text, loaded]))
""",
        tiny_onnx, clip,
    )  # fmt: skip
    text, loaded = found
    assert text == load(tiny_onnx).transcribe(clip).text != ""
    packages = {name.partition(".")[0] for name in loaded}
    assert not packages & {*ABSENT, "compress"}
    rooms = {name.split(".")[1] for name in loaded if name.startswith("asr.")}
    assert rooms == {"runtime"}


def test_the_command_needs_no_torch(tiny_onnx, clip):
    code = """
import asr.runtime.transcribe, contextlib, io, json
out = io.StringIO()
with contextlib.redirect_stdout(out):
    code = asr.runtime.transcribe.main(["--model_path", sys.argv[1], "--audio_path", sys.argv[2]])
print(json.dumps([code, out.getvalue()]))
"""
    assert run_python(code, tiny_onnx, clip) == [0, load(tiny_onnx).transcribe(clip).text + "\n"]


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


@pytest.mark.slow
def test_the_core_installs_alone_and_transcribes(tiny_onnx, clip, tmp_path):
    source = tmp_path / "source"  # building writes into the folder
    source.mkdir()
    for name in ("asr", "compress"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    venv.create(tmp_path / "venv", with_pip=True)
    scripts = tmp_path / "venv" / Path(sysconfig.get_path("scripts")).name
    install = subprocess.run(
        [scripts / "python", "-m", "pip", "install", "--quiet", source],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if install.returncode and "No matching distribution" in install.stderr:
        pytest.skip("no package registry at hand")
    assert install.returncode == 0, install.stderr
    listed = subprocess.run(
        [scripts / "python", "-m", "pip", "list", "--format", "json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = {entry["name"].lower() for entry in json.loads(listed.stdout)}
    assert {"conformer-asr-edge", "onnxruntime", "numpy", "soundfile", "soxr"} <= names
    assert not names & {"torch", "jiwer", "librosa"}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [scripts / "asr-transcribe", "--model_path", tiny_onnx, "--audio_path", clip],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == load(tiny_onnx).transcribe(clip).text
