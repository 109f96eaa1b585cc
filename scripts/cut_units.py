"""Cuts recordings into units from which scripts/speak_texts.py puts other sentences together.

    python scripts/cut_units.py --model_path model.pt --lexicon lexicon.tsv --data_dir data \\
        --teacher hama_wheel/hama/assets/asr_waveform.hama --output_path units.npz

A unit holds what the model's front (its stem and first blocks) makes of the recording, degraded as
in training. The phoneme recogniser of the wheel `hama` 1.7.0 finds where each phoneme of the text
is heard best. Recordings with a word that the lexicon does not have, or that do not fit their text,
are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

from asr.corpus.lexicon import Pronunciations, read_lexicon
from asr.corpus.manifest import Utterance
from asr.corpus.splits import load_dataset
from asr.corpus.units import BOUNDARY, END, Units, find_peaks
from asr.importing.phonemes import Ears
from asr.network.checkpoint import load_checkpoint
from asr.runtime.audio import read_audio
from asr.runtime.cli import Parser, guarded
from asr.runtime.features import normalize, raw_log_mel
from asr.runtime.files import check_writable
from asr.training.augment import AugmentConfig, degrade

AUGMENT = AugmentConfig(
    speed=0, warp=0, reverb=0.08, noise=0.15, clip=0.03, telephone=0.08, level=0.2, time_masks=0,
    freq_masks=0,
)  # fmt: skip
LEAST = -1.5  # natural logarithm: of a frame on average, for a text that fits


def cut(
    args: argparse.Namespace, ears: Ears, lexicon: Pronunciations, utterances: Sequence[Utterance]
) -> Iterator[tuple[Utterance, np.ndarray, list[int], np.ndarray]]:
    """Each recording that fits its text: frames (T, D), symbols (S,) and their peaks (S,)."""
    checkpoint = load_checkpoint(args.model_path)
    model, rng = checkpoint.model.eval(), np.random.default_rng(args.seed)
    place = {name: number for number, name in enumerate(ears.names, BOUNDARY + 1)}
    for utterance in utterances:
        words = [lexicon.get(word, ("",)) for word in utterance.text.split()]
        symbols = [s for word in words for s in (*(place.get(p, 0) for p in word), BOUNDARY)][:-1]
        if not all(symbols) or not symbols:
            continue
        waveform = read_audio(utterance.audio_filepath)
        try:
            peaks, fit = find_peaks(ears(waveform), np.array(symbols))
        except ValueError:  # more phonemes than frames
            continue
        if fit < LEAST:
            continue
        features = raw_log_mel(degrade(waveform, rng, AUGMENT, lambda _: []), checkpoint.features)
        features = normalize(features, checkpoint.features)
        with torch.no_grad():
            length = torch.tensor([len(features)])
            hidden = model.front(torch.from_numpy(features)[None], length, args.blocks)[0][0]
        yield utterance, hidden.numpy(), symbols, np.minimum(peaks, len(hidden) - 1)


def run(args: argparse.Namespace) -> int:
    check_writable(args.output_path)
    torch.set_num_threads(args.threads)
    utterances = [u for u in load_dataset(args.data_dir, "train") if u.duration <= 20]
    lexicon = read_lexicon(args.lexicon)
    ears = Ears(args.teacher, lexicon)
    some = [utterances[i] for i in np.random.default_rng(args.seed).permutation(len(utterances))]
    bar = tqdm(total=args.hours, unit="h", disable=None)
    hidden, phones, peaks, speakers, at, hours = [], [], [], [], 0, 0.0
    names: dict[str, int] = {}
    for utterance, frames, symbols, where in cut(args, ears, lexicon, some):
        hidden.append(frames.astype(np.float16))
        phones += [END, *symbols, END]
        peaks += [at, *(where + at), at + len(frames) - 1]
        speaker = names.setdefault(utterance.speaker or utterance.id, len(names))
        speakers += [speaker] * (len(symbols) + 2)
        at, hours = at + len(frames), hours + utterance.duration / 3600
        bar.update(utterance.duration / 3600)
        if hours >= args.hours:
            break
    if not hidden:
        raise ValueError("no recording has words of the lexicon alone and fits its text")
    found = ["<end>", "|", *ears.names]
    Units(
        np.concatenate(hidden), np.array(phones, np.int16), np.array(peaks, np.int32),
        np.array(speakers, np.int32), found,
    ).save(args.output_path)  # fmt: skip
    print(f"{args.output_path}: {len(phones)} phonemes of {len(hidden)} recordings, {hours:.2f} h")
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_path", required=True, help="checkpoint whose front is kept frozen in training")
    add("--blocks", type=int, default=4, help="of its front (%(default)s)")
    add("--teacher", required=True, help="asr_waveform.hama of the wheel hama 1.7.0")
    add("--lexicon", required=True, help="of scripts/pronounce.py")
    add("--data_dir", required=True, nargs="+", help="manifests; the train* are cut")
    add("--hours", type=float, default=10.0, help="at most (%(default)s)")
    add("--threads", type=int, default=1, help="processor threads (%(default)s)")
    add("--seed", type=int, default=0, help="of the choice and of what degrades (%(default)s)")
    add("--output_path", required=True, help=".npz to write")
    args = parser.parse_args(argv)
    if not args.hours > 0:
        parser.error(f"--hours {args.hours} must be above 0")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
