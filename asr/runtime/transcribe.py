"""The command transcribe.py, installed as asr-transcribe: speech to text, on any computer.

With an `.onnx` model it needs neither torch nor the rest of the training code.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from asr.runtime import formats
from asr.runtime.audio import EXTENSIONS, count_channels
from asr.runtime.beam import BeamConfig
from asr.runtime.capture import from_microphone, from_stream, until_interrupted
from asr.runtime.cli import Parser, Progress, describe, guarded, number
from asr.runtime.files import check_writable, printable, stream_of
from asr.runtime.finding import find_audio
from asr.runtime.language_model import add_beam_flags, beam_from_flags
from asr.runtime.output import Output
from asr.runtime.recognizer import MIN_CONFIDENCE, Recognizer, load
from asr.runtime.result import Result
from asr.runtime.shipped import find_language_model
from asr.runtime.sources import FFMPEG_EXTENSIONS, AudioError, AudioWarning

EACH = -1  # of --channel


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command; `audio` has the files named with and without --audio_path."""
    parser = Parser(
        "Turns audio files into text, on any computer: an .onnx model needs no torch.",
        epilog="One file gives its text; several, or a folder, give lines PATH<TAB>TEXT. A file "
        "that cannot be read, or not to its end, is named on stderr and the others go on; the exit "
        "code is then 2.",
    )
    add = parser.add_argument
    add("audio", nargs="*", metavar="AUDIO",
        help="audio files, - for standard input, or folders to search for "
        f"{', '.join(EXTENSIONS + FFMPEG_EXTENSIONS)}; the latter need ffmpeg")  # fmt: skip
    add("--audio_path", nargs="+", default=[], metavar="PATH", help="the same, by name")
    add("--microphone", action="store_true",
        help="listen: text while somebody speaks, final at a pause; needs sounddevice")  # fmt: skip
    add("--stdin", action="store_true",
        help="the same for raw 16-bit samples, mono, on standard input")  # fmt: skip
    add("--sample_rate", type=int, help="of --stdin, Hz (default: 16000)")
    add("--model_path", help=".onnx or .pt model (default: the English one that ships)")
    add("--output_path", "--output_text", metavar="FILE",
        help="file to write, or a folder for a file each (default: standard output)")  # fmt: skip
    add("--output_format", choices=formats.SUFFIXES,
        help="text; json: an object a line; srt, vtt: subtitles; tsv: segments in milliseconds; "
        "words: with start, end and confidence (default: by the file's ending)")  # fmt: skip
    add("--min_confidence", type=number, default=MIN_CONFIDENCE,
        help="leave out segments of which a smaller share of the words is expected to be right; "
        f"0 leaves in what is heard in noise and music (default: {MIN_CONFIDENCE})")  # fmt: skip
    add("--channel", type=channel, metavar="left|right|N|each",
        help="of several channels: one, or each for itself (default: their mean)")  # fmt: skip
    add(
        "--no_vad",
        action="store_true",
        help="read the silences too, in windows that overlap, without looking for speech",
    )
    add("--threads", type=int, default=0, help="0 means all cores (default: 0)")
    add_beam_flags(parser)
    args = parser.parse_args(argv)
    args.audio += args.audio_path
    if bool(args.audio) + args.microphone + args.stdin != 1:
        parser.error("name audio files or folders, or --microphone, or --stdin")
    if args.sample_rate is not None and not args.stdin:
        parser.error("--sample_rate is that of --stdin; a file brings its own")
    if (args.no_vad or args.channel is not None) and not args.audio:
        parser.error("--no_vad and --channel are for files; live sound is mono")
    return args


@dataclass(frozen=True)
class Task:
    """A file, the channel of it to be heard (None: their mean), and the name of the result."""

    path: Path
    channel: int | None
    name: Path


def channel(text: str) -> int:
    """A channel from 0, or `EACH`, of left, right, a number from 1, or each."""
    names = {"left": 0, "right": 1, "each": EACH}
    if text in names:
        return names[text]
    if not text.isdecimal() or int(text) < 1:
        raise ValueError
    return int(text) - 1


def tasks_of(path: Path, chosen: int | None) -> list[Task]:
    """What is to be done for a file: one task, or one a channel."""
    if chosen != EACH:
        return [Task(path, chosen, path)]
    if not path.is_file():
        raise ValueError(
            f"{printable(path)}: --channel each needs a file, to read it several times"
        )
    try:
        count = count_channels(path)
    except AudioError:
        return [Task(path, None, path)]  # reading it says what is wrong
    names = [path.with_name(f"{path.stem}.channel{n + 1}{path.suffix}") for n in range(count)]
    return [Task(path, n, name) for n, name in enumerate(names)]


def run(args: argparse.Namespace) -> int:
    """Transcribes, writes, and returns the exit code: 2 if some of several files failed."""
    if args.threads < 0:
        raise ValueError(f"--threads {args.threads}: name a number of threads, or 0 for all cores")
    if args.lm is None and args.model_path is None and not args.grammar:
        args.lm = find_language_model()
    if args.microphone or args.stdin:
        return run_live(args)
    files = find_audio(args.audio)
    several = len(files) > 1 or Path(args.audio[0]).is_dir() or args.channel == EACH
    form = args.output_format or formats.format_of(args.output_path)
    beam: BeamConfig | Literal[False] = beam_from_flags(args) or False
    tasks = [task for path in files for task in tasks_of(path, args.channel)]
    failed = 0
    with Output(args.output_path, form, several, [task.name for task in tasks], files) as output:
        recognizer = load(args.model_path, args.threads, beam, args.min_confidence)
        if args.no_vad:
            recognizer.detector = None
        for place, task in enumerate(tasks, 1):
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", AudioWarning)
                    place_of = f"{place} of {len(tasks)}" if several else ""
                    result = follow(recognizer, task, place_of)
            except (ValueError, OSError) as error:
                if not several:
                    raise
                print(f"error: {describe(error)}", file=sys.stderr)
                failed += 1
                continue
            output.write(task.name, result)
            for warning in caught:
                print(f"warning: {warning.message}", file=sys.stderr)
            failed += any(issubclass(warning.category, AudioWarning) for warning in caught)
    if failed and several:
        print(f"{failed} of {len(tasks)} files failed", file=sys.stderr)
    return 2 if failed else 0


def run_live(args: argparse.Namespace) -> int:
    """Writes what is said as it is said, until the end of the sound or Ctrl-C."""
    form = args.output_format or formats.format_of(args.output_path)
    if form not in ("text", "json"):
        raise ValueError(f"--output_format {form}: what is being said is written as text or json")
    if args.output_path:
        check_writable(args.output_path)
    beam: BeamConfig | Literal[False] = beam_from_flags(args) or False
    recognizer = load(args.model_path, args.threads, beam, args.min_confidence)
    rate = args.sample_rate
    if rate is None:
        rate = recognizer.info.features.sample_rate
    chunks = from_stream(sys.stdin.buffer, rate) if args.stdin else from_microphone(rate)
    with contextlib.ExitStack() as stack:
        out = sys.stdout
        if args.output_path:
            place = stream_of(Path(args.output_path))
            target = args.output_path if place is None else place
            out = stack.enter_context(open(target, "w", encoding="utf-8"))
        for event in recognizer.listen(until_interrupted(chunks), rate):
            out.write(formats.render_event(event, form, out.isatty()))
            out.flush()
    return 0


def follow(recognizer: Recognizer, task: Task, place: str) -> Result:
    """A file's result; how far it is shows on a terminal."""
    segments = []
    with Progress(f"{place} {printable(task.name.name)}".strip()) as progress:
        for segment in recognizer.stream(task.path, channel=task.channel):
            segments.append(segment)
            progress.show(f"{segment.end / 60:.1f} min")
    return Result(tuple(segments))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
