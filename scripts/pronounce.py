"""Writes how words are pronounced, by the wheel `hama` 1.7.0 (pip install hama==1.7.0; Apache-2.0).

    python scripts/pronounce.py --lm english.lm --output_path lexicon.tsv

About 25 words a second. A run that was stopped goes on: the same command again.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from asr.corpus.splits import load_dataset
from asr.runtime.cli import Parser, guarded
from asr.runtime.files import check_writable
from asr.runtime.language_model import load_model


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--lm", help="the words of this language model, the likeliest first")
    add("--data_dir", nargs="+", help="and before them those of the texts of these manifests")
    add("--most", type=int, default=0, help="so many words at most; 0: all")
    add("--output_path", required=True, help="lexicon: a line word, tab, phonemes")
    args = parser.parse_args(argv)
    if not (args.lm or args.data_dir):
        parser.error("give --lm or --data_dir: whose words are to be pronounced?")
    return args


def words(args: argparse.Namespace) -> list[str]:
    """Each word once, those of recordings by how often they are said."""
    found: list[str] = []
    if args.data_dir:
        texts = (utterance.text for utterance in load_dataset(args.data_dir, "train"))
        found += [word for word, _ in Counter(w for t in texts for w in t.split()).most_common()]
    if args.lm:
        model = load_model(args.lm)
        likely = model.unigrams().argsort()[::-1]
        found += [model.words[i] for i in likely if not model.words[i].startswith("<")]
    found = list(dict.fromkeys(found))
    return found[: args.most] if args.most else found


def run(args: argparse.Namespace) -> int:
    try:
        from hama import G2PModel
    except ImportError:
        raise ValueError("hama is not installed: pip install hama==1.7.0") from None
    path = Path(args.output_path)
    check_writable(path)
    wanted = words(args)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    known = {line.partition("\t")[0] for line in lines}
    left = [word for word in wanted if word not in known]
    model = G2PModel()
    with open(path, "a", encoding="utf-8", buffering=1) as file:
        for word in tqdm(left, unit="word", disable=None):
            phones = [part.phoneme for part in model.predict(word).alignments if part.phoneme]
            file.write(f"{word}\t{' '.join(phones)}\n")
    print(f"{path}: {len(wanted)} words")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
