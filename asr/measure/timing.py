"""Speed and memory of a model, measured in a process of its own.

A fresh process has exactly the threads asked for, in torch, onnxruntime and NumPy alike, and its
memory is that of inference alone: the interpreter, the libraries the model needs, the model and the
audio. What is timed is waveform to text: features, network and decoding, one utterance at a time;
reading and decoding of audio files is not.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from asr.common.provenance import ROOT
from asr.runtime.audio import read_audio
from asr.runtime.beam import BeamConfig
from asr.runtime.cli import guarded
from asr.runtime.recognizer import load

DEFINITION = (
    "RTF = processing time / audio time, one utterance at a time; processing is features, network "
    "and decoding, without reading the audio file"
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class TimedModel:
    """A model loaded in its own process with `threads` threads and the `audio` files in memory.

    Use it as a context manager. Raises ValueError, with the process's own line, where it fails.
    """

    def __init__(
        self, model_path: str | Path, threads: int, audio: Sequence[str | Path],
        beam: BeamConfig | None = None,
    ) -> None:  # fmt: skip
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths.rstrip(os.pathsep)}
        environment |= dict.fromkeys(THREAD_VARIABLES, str(threads))
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "asr.measure.timing"],
            env=environment, text=True, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        task = {"model": str(model_path), "threads": threads, "audio": [str(p) for p in audio]}
        self._ask(task | {"beam": beam and asdict(beam)})

    def __enter__(self) -> TimedModel:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def round(self) -> list[float]:
        """Seconds that each of the audio files took, transcribed once, in order."""
        seconds: list[float] = self._ask("round")
        return seconds

    def peak_rss(self) -> float:
        """Most memory in bytes that the process has held so far; see `peak_memory`."""
        peak: float = self._ask("peak_rss")
        return peak

    def _ask(self, question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended; why is read below
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        raise ValueError(
            (lines[-1] if lines else "the timing process died").removeprefix("error: ")
        )


def measure(
    model_path: str | Path, threads: int, audio: Sequence[str | Path],
    durations: Sequence[float], rounds: int = 3, beam: BeamConfig | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Latency in seconds, RTF and peak memory in bytes of a model over some audio files.

    After one round of warm-up every file is transcribed `rounds` times; its latency is the median.
    Memory is NaN where it is not known.
    """
    with TimedModel(model_path, threads, audio, beam) as model:
        model.round()
        latencies = np.median([model.round() for _ in range(rounds)], axis=0)
        peak = model.peak_rss()
    return summarise(latencies.tolist(), durations) | {"threads": threads, "peak_rss": peak}


def summarise(latencies: Sequence[float], durations: Sequence[float]) -> dict[str, float]:
    """Real-time factor over all of the audio, median and 95th percentile of latency in seconds."""
    p50, p95 = np.percentile(latencies, [50, 95])
    return {
        "rtf": float(np.sum(latencies) / np.sum(durations)),
        "latency_p50": float(p50),
        "latency_p95": float(p95),
    }


def peak_memory() -> float:
    """Most memory in bytes that this process has held; NaN on Windows, which has no `resource`.

    VmHWM where there is one: Linux lets a child inherit its parent's ru_maxrss.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ModuleNotFoundError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def serve() -> None:
    """The process's side: loads what the first line names, then answers a line at a time."""
    task = json.loads(sys.stdin.readline())
    beam = task["beam"] and BeamConfig(**task["beam"])
    recognizer = load(task["model"], threads=task["threads"], beam=beam)
    rate = recognizer.info.features.sample_rate
    waveforms = [read_audio(path, rate) for path in task["audio"]]
    _answer("ready")
    for line in sys.stdin:
        if json.loads(line) == "peak_rss":
            _answer(peak_memory())
            continue
        seconds = []
        for waveform in waveforms:
            start = time.perf_counter()
            recognizer.transcribe(waveform, rate)
            seconds.append(time.perf_counter() - start)
        _answer(seconds)


def _answer(value: Any) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    sys.exit(guarded(serve))
