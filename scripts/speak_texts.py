"""Speaks sentences with units of recordings: more to train on behind a front that is frozen.

    python scripts/speak_texts.py --units units.npz --lexicon lexicon.tsv --text books.txt \\
        --sentences 12000 --output_dir data/spoken

Writes OUTPUT_DIR/train-texts.json and, beside it, the frames of every sentence: train.py takes the
manifest like any other while --freeze_blocks and --freeze_epochs hold the front that the units come
from. Sentences are drawn so that rare words are heard, too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from asr.corpus.lexicon import read_lexicon
from asr.corpus.manifest import Utterance, write_manifest
from asr.corpus.units import Units
from asr.runtime.cli import Parser, guarded

FRAMES = 50  # a second
WORDS = (3, 22)  # of a sentence
RUN = 20  # lines that are read at one place
PATIENCE = 60  # lines read for each sentence that is wanted


def draw(
    path: str, known: Container[str], wanted: int, rng: np.random.Generator
) -> list[list[str]]:
    """Sentences of a text, one a line, of `known` words, in which some word is still rare."""
    size, often = os.path.getsize(path), max(6, wanted // 1500)
    counts, seen, found = Counter[str](), set[bytes](), list[list[str]]()
    with open(path, "rb") as file:
        for _ in range(PATIENCE * wanted // RUN):
            file.seek(int(rng.integers(size)))
            file.readline()  # the rest of a line
            for line in (file.readline().strip() for _ in range(RUN)):
                words = line.decode("utf-8", "replace").split()
                if not WORDS[0] <= len(words) <= WORDS[1] or line in seen:
                    continue
                if (
                    any(word not in known for word in words)
                    or min(counts[word] for word in words) >= often
                ):
                    continue
                seen.add(line)
                counts.update(words)
                found.append(words)
                if len(found) == wanted:
                    return found
    return found


def run(args: argparse.Namespace) -> int:
    units, rng = Units.load(args.units), np.random.default_rng(args.seed)
    place = {name: number for number, name in enumerate(units.names)}
    lexicon = {
        word: [place[phone] for phone in spoken]
        for word, spoken in read_lexicon(args.lexicon).items()
        if all(phone in place for phone in spoken)
    }
    sentences = draw(args.text, lexicon, args.sentences, rng)
    if not sentences:
        raise ValueError(f"{args.text}: no sentence, one a line, of words that the lexicon has")
    folder = Path(args.output_dir)
    frames_folder = folder.absolute() / "frames"
    frames_folder.mkdir(parents=True, exist_ok=True)
    spoken = []
    for number, words in enumerate(tqdm(sentences, unit="sentence", disable=None)):
        frames = units.speak(units.spell(words, lexicon), rng)
        if frames is None:
            continue
        path = frames_folder / f"{number}.npy"
        np.save(path, frames.astype(np.float16))
        spoken.append(Utterance(str(path), round(len(frames) / FRAMES, 3), " ".join(words)))
    write_manifest(folder / "train-texts.json", spoken)
    hours = sum(utterance.duration for utterance in spoken) / 3600
    different = len({word for words in sentences for word in words})
    print(
        f"{folder / 'train-texts.json'}: {len(spoken)} sentences, {hours:.2f} h, {different} words"
    )
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--units", required=True, help="of scripts/cut_units.py")
    add("--lexicon", required=True, help="of scripts/pronounce.py")
    add("--text", required=True, help="sentences, one a line")
    add("--sentences", type=int, default=10000, help="how many (%(default)s)")
    add("--seed", type=int, default=0, help="of sentences and units (%(default)s)")
    add("--output_dir", required=True, help="folder for manifest and frames")
    args = parser.parse_args(argv)
    if args.sentences < 1:
        parser.error(f"--sentences {args.sentences} must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
