"""Measures the most memory and the time that a recording of hours takes, read greedily.

    python experiments/measure_long_file.py --test_data ../shared/LibriSpeech/dev-clean \
        --output_path experiments/speed/long_file.json

The recording is a FLAC file of utterances with pauses between them, over and over.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import soundfile

from asr.common.provenance import ROOT, command_line, portable_path
from asr.measure.evaluation import read_test_data
from asr.measure.machine import busy_cores, provenance
from asr.runtime.audio import SAMPLE_RATE, read_audio
from asr.runtime.cli import Parser, guarded, number
from asr.runtime.files import check_writable, write_json

PAUSE = 0.7  # seconds between utterances
LOOK = 0.2  # seconds from one look at the memory to the next


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_path", help=".onnx or .pt model (default: the English one that ships)")
    add("--test_data", required=True, help="manifest or LibriSpeech folder")
    add("--hours", type=number, default=3.0, help="length of the recording (default: 3)")
    parser.add_output_path("JSON with the figures")
    args = parser.parse_args(argv)
    if not 0 < args.hours <= 24:
        parser.error(f"--hours {args.hours} must lie in (0, 24]")
    args.command = command_line("experiments/measure_long_file.py", argv)
    return args


def write_recording(path: Path, test_data: str, seconds: float) -> tuple[float, int]:
    """Writes utterances one after another; how long the file is, and the words said in it."""
    length = words = 0
    utterances = read_test_data(test_data)
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1, "PCM_16") as file:
        for utterance in itertools.cycle(utterances):
            if length >= seconds * SAMPLE_RATE:
                break
            said = read_audio(utterance.audio_filepath)
            file.write(np.pad(said, (0, int(PAUSE * SAMPLE_RATE))))
            length += len(said) + int(PAUSE * SAMPLE_RATE)
            words += len(utterance.text.split())
    return length / SAMPLE_RATE, words


def peak_memory(process: subprocess.Popen[bytes]) -> int:
    """Most memory in bytes that a process has held when it ends (Linux)."""
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            break
        fields = [line.split() for line in status.splitlines() if line.startswith("VmHWM:")]
        peak = max([peak, *(1024 * int(kilobytes) for _, kilobytes, _ in fields)])
        time.sleep(LOOK)
    return peak


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes."""
    if args.output_path:
        check_writable(args.output_path)
    if not Path("/proc/self/status").exists():
        raise ValueError("the memory of a process is read from /proc, which is not here; use Linux")
    busy = busy_cores()
    with tempfile.TemporaryDirectory() as folder:
        recording, text = Path(folder) / "long.flac", Path(folder) / "long.txt"
        seconds, said = write_recording(recording, args.test_data, 3600 * args.hours)
        command = [sys.executable, "-m", "asr.runtime.transcribe", str(recording)]
        command += ["--lm", "none", "--threads", "1", "--output_path", str(text)]
        if args.model_path:
            command += ["--model_path", str(Path(args.model_path).resolve())]
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        peak = peak_memory(process)
        if process.wait():
            raise ValueError(f"the command failed with exit code {process.returncode}, see above")
        took = time.perf_counter() - start
        heard = len(text.read_text(encoding="utf-8").split())
    result = {
        "seconds_of_audio": seconds, "seconds": took, "times_real_time": seconds / took,
        "peak_memory": peak, "words_said": said, "words_heard": heard,
    }  # fmt: skip
    print(f"{seconds / 3600:.2f} h in {took:.0f} s, {peak / 1e6:.0f} MB; {heard} of {said} words")
    if args.output_path:
        about = {
            "model": portable_path(args.model_path or "the English model that ships"),
            "test_data": portable_path(args.test_data),
            "busy_cores_before": busy,
        }
        write_json(args.output_path, about | provenance(args.command) | result)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
