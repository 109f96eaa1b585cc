"""Holds out dev-open: 30 minutes of Common Voice speakers and 10 minutes of telephone speech.

    python scripts/english_data.py --data_dir prepared --output_dir data

`prepared` holds the manifests that prepare_data.py made. Common Voice is held out by speaker; the
telephone recordings name none and are held out by recording, those whose sentence is in no training
text. The other manifests are copied. Chosen by digests of the names: the same ones every time.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asr.corpus.manifest import Utterance, read_manifest, write_manifest
from asr.runtime.cli import Parser, guarded, number

COMMON_VOICE, TELEPHONE = "train-common_voice", "train-minds14"


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def hold_out(
    utterances: Iterable[Utterance], minutes: float
) -> tuple[list[Utterance], list[Utterance]]:
    """What stays and what is held out: whole speakers, or recordings of nobody known."""
    groups: dict[str, list[Utterance]] = {}
    for u in utterances:
        groups.setdefault(u.speaker or u.id, []).append(u)
    kept: list[Utterance] = []
    held: list[Utterance] = []
    for name in sorted(groups, key=digest):
        full = sum(u.duration for u in held) >= 60 * minutes
        (kept if full else held).extend(groups[name])
    return kept, held


def run(args: argparse.Namespace) -> int:
    data_dir, output_dir = Path(args.data_dir), Path(args.output_dir)
    manifests = {path.stem: read_manifest(path) for path in sorted(data_dir.glob("*.json"))}
    for name in (COMMON_VOICE, TELEPHONE):
        if name not in manifests:
            raise ValueError(f"{data_dir}: no {name}.json in it; run prepare_data.py first")
    voices, open_voices = hold_out(manifests[COMMON_VOICE], args.common_voice)
    others = (u for n, part in manifests.items() if n != TELEPHONE for u in part)
    counts: dict[str, int] = {}
    for u in (*others, *manifests[TELEPHONE]):
        counts[u.text] = counts.get(u.text, 0) + 1
    alone = [u for u in manifests[TELEPHONE] if counts[u.text] == 1]
    _, open_calls = hold_out(alone, args.telephone)
    taken = {u.id for u in open_calls}
    manifests[COMMON_VOICE] = voices
    manifests[TELEPHONE] = [u for u in manifests[TELEPHONE] if u.id not in taken]
    manifests["dev-open"] = [*open_voices, *open_calls]
    said = {u.text for u in manifests["dev-open"]}
    for name, part in manifests.items():
        if name.startswith("train"):
            part = [u for u in part if u.text not in said]
        write_manifest(output_dir / f"{name}.json", part)
        hours = sum(u.duration for u in part) / 3600
        print(f"{name:24}{len(part):7,} utterances {hours:7.2f} h")
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data_dir", required=True, help="manifests by prepare_data.py")
    add("--output_dir", required=True, help="where the manifests to train from go")
    add("--common_voice", type=number, default=30.0, help="minutes held out (%(default)s)")
    add("--telephone", type=number, default=10.0, help="minutes held out (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
