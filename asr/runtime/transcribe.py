"""The command transcribe.py, installed as asr-transcribe: audio files to text, on any computer.

With an `.onnx` model it needs neither torch nor the rest of the training code.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from asr.runtime.audio import EXTENSIONS
from asr.runtime.cli import Parser, describe, guarded
from asr.runtime.files import write_atomically
from asr.runtime.language_model import add_beam_flags, beam_from_flags
from asr.runtime.recognizer import load

SHIPPED = Path("experiments", "librispeech", "model_int8.onnx")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(
        "Turns audio files into text, on any computer: an .onnx model needs no torch.",
        epilog="One file gives its text; several, or a folder, give lines PATH<TAB>TEXT. A file "
        "that cannot be read is named on stderr and the others go on; the exit code is then 2.",
    )
    parser.add_argument(
        "--audio_path", nargs="+", required=True, metavar="PATH",
        help=f"audio files, or folders to search for {', '.join(EXTENSIONS)}",
    )  # fmt: skip
    parser.add_argument("--model_path", help=f".onnx or .pt model (default: {SHIPPED})")
    parser.add_argument(
        "--output_text", "--output_path", metavar="FILE",
        help="file to write (default: standard output)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, help="0 means all cores (default: 0)")
    add_beam_flags(parser)
    return parser.parse_args(argv)


def find_model(path: str | None) -> Path:
    """The model named, or the one that ships: beside the package, else in the working directory.

    An installed package has no experiments/ beside it; a checkout has, wherever it is run from.
    """
    if path is not None:
        return Path(path)
    folders = dict.fromkeys((Path(__file__).resolve().parents[2], Path.cwd()))
    for folder in folders:
        if (folder / SHIPPED).exists():
            return folder / SHIPPED
    raise ValueError(
        f"no {SHIPPED} in {' or in '.join(map(str, folders))}; name a model with "
        "--model_path MODEL.onnx, or run this in the repository's folder"
    )


def find_audio(paths: Sequence[str]) -> list[Path]:
    """The files named, and those below the folders named, in order of their paths."""
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        inside = [p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file()]
        if not inside:
            raise ValueError(f"{path}: no audio in this folder ({', '.join(EXTENSIONS)})")
        found += sorted(inside)
    return found


def run(args: argparse.Namespace) -> int:
    """Transcribes, writes, and returns the exit code: 2 if some of several files failed."""
    if args.threads < 0:
        raise ValueError(f"--threads {args.threads}: name a number of threads, or 0 for all cores")
    files = find_audio(args.audio_path)
    several = len(files) > 1 or Path(args.audio_path[0]).is_dir()
    if args.output_text and any(same_file(args.output_text, path) for path in files):
        raise ValueError(f"{args.output_text}: is the audio itself; choose another --output_text")
    if args.output_text and Path(args.output_text).is_dir():
        raise ValueError(f"{args.output_text}: a folder; name a file in it with --output_text")
    beam = beam_from_flags(args)
    recognizer = load(find_model(args.model_path), threads=args.threads, beam=beam)
    lines: list[str] = []
    failed = 0
    for path in files:
        try:
            text = recognizer.transcribe(path).text
        except (ValueError, OSError) as error:
            if not several:
                raise
            print(f"error: {describe(error)}", file=sys.stderr)
            failed += 1
            continue
        lines.append(f"{path}\t{text}\n" if several else f"{text}\n")
        if not args.output_text:
            print(lines[-1], end="", flush=True)
    if args.output_text and (lines or not failed):
        write_atomically(args.output_text, "".join(lines))
    if failed:
        print(f"{failed} of {len(files)} files failed", file=sys.stderr)
    return 2 if failed else 0


def same_file(one: str | Path, other: str | Path) -> bool:
    """Whether two paths lead to one existing file."""
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
