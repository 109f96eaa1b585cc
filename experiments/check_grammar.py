"""Counts how often a grammar takes other speech for its phrases, and refuses its phrases.

    python experiments/check_grammar.py --test_data ../shared/LibriSpeech/dev-clean \
        --output_path experiments/grammar.json

Phrases are the breaths of one to five words and eight letters or more in the recordings, cut out
where the speaker pauses (by forced alignment of the texts). Each is heard under three grammars of
GROUP phrases: one that holds it, one of other breaths, and one that holds it with one word changed.
The table tells the shares of errors for several thresholds; that of the program is among them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from asr.common.provenance import command_line, portable_path
from asr.corpus.manifest import Utterance
from asr.corpus.transcripts import words_of
from asr.measure.evaluation import read_test_data
from asr.measure.machine import provenance
from asr.runtime.audio import read_audio
from asr.runtime.beam import BeamConfig, BeamSearch
from asr.runtime.cli import Parser, guarded
from asr.runtime.files import check_writable, write_json
from asr.runtime.pauses import settle
from asr.runtime.phrases import Grammar, Phrase
from asr.runtime.recognizer import Recognizer, load
from asr.runtime.rejection import UNLIKELY, worst_word
from asr.runtime.tokenizer import join
from asr.runtime.words import read_words

GROUP = 20  # phrases of a grammar
PAUSE = 0.12  # seconds between the breaths
AROUND = 0.2  # seconds at most of a pause that stay with a breath
WORDS, LETTERS = 5, 8  # of a phrase: at most, at least
LONGEST = 16.0  # seconds of a recording
THRESHOLDS = sorted({1.6, 1.8, 2.0, 2.2, 2.5, 3.0, UNLIKELY})

Clip = tuple[Phrase, npt.NDArray[np.float32]]  # what was said, and its log_probs (T', V)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_path", help=".onnx or .pt model (default: the English one that ships)")
    add("--test_data", required=True, help="manifest or LibriSpeech folder")
    add("--every", type=int, default=1, metavar="N", help="only every Nth utterance (default: all)")
    add("--first", type=int, default=0, metavar="N", help="from this one on: another part of them")
    add("--seed", type=int, default=0, help="seed of the groups and changed words (default: 0)")
    parser.add_output_path("JSON with the table")
    args = parser.parse_args(argv)
    args.command = command_line("experiments/check_grammar.py", argv)
    return args


def breaths(recognizer: Recognizer, utterance: Utterance) -> Iterator[Clip]:
    """The phrases of an utterance that can be cut out, heard on their own."""
    rate = recognizer.info.features.sample_rate
    waveform = read_audio(utterance.audio_filepath, rate)
    ids = recognizer.tokenizer.encode(" ".join(words_of(utterance.text)))
    log_probs = recognizer.waveform_log_probs(waveform)
    seconds = recognizer.samples_per_frame / rate
    words = settle(read_words(log_probs, ids, recognizer.info.tokens, seconds), waveform, rate)
    starts = [word.start for word in words] + [len(waveform) / rate]
    ends = [0.0] + [word.end for word in words]
    cuts = [i for i in range(len(words) + 1) if starts[i] - ends[i] >= PAUSE]
    cuts = sorted({0, *cuts, len(words)})
    for first, stop in pairwise(cuts):
        phrase = tuple(word.text for word in words[first:stop])
        if len(phrase) <= WORDS and len("".join(phrase)) >= LETTERS:
            begin = starts[first] - min(AROUND, max(0.0, starts[first] - ends[first]) / 2)
            end = ends[stop] + min(AROUND, max(0.0, starts[stop] - ends[stop]) / 2)
            clip = waveform[int(begin * rate) : int(end * rate)]
            yield phrase, recognizer.waveform_log_probs(clip)


def changed(phrase: Phrase, words: Sequence[str], random: np.random.Generator) -> Phrase:
    """The phrase with one word in place of another that is about as long."""
    at = int(random.integers(len(phrase)))
    others = [word for word in words if word not in phrase]
    alike = sorted(others, key=lambda word: abs(len(word) - len(phrase[at])))[:GROUP]
    return (*phrase[:at], alike[int(random.integers(len(alike)))], *phrase[at + 1 :])


def hear(phrases: Sequence[Phrase], clip: Clip, tokens: Sequence[str]) -> tuple[bool, float]:
    """Whether the phrase was the nearest of these, and how unlikely its worst word is."""
    config = BeamConfig(token_threshold=np.inf, beam_threshold=np.inf)
    best = BeamSearch(tokens, config, grammar=Grammar(phrases, tokens)).search(clip[1])[0]
    if best.score == -np.inf:
        return False, np.inf
    text = join(tokens[i] for i in best.ids)
    return tuple(text.split()) == clip[0], worst_word(clip[1], best.ids, tokens)


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes."""
    if args.output_path:
        check_writable(args.output_path)
    recognizer = load(args.model_path, 1, False)
    tokens = recognizer.info.tokens
    utterances = read_test_data(args.test_data)[args.first :: args.every]
    utterances = [u for u in utterances if u.duration <= LONGEST]
    random = np.random.default_rng(args.seed)
    clips = [
        clip
        for utterance in tqdm(utterances, unit="utt", leave=False, disable=None)
        for clip in breaths(recognizer, utterance)
    ]
    if len(clips) < 2 * GROUP:
        raise ValueError(
            f"{args.test_data}: only {len(clips)} phrases in {len(utterances)} recordings; "
            "a smaller --every reads more of them"
        )
    clips = [clips[i] for i in random.permutation(len(clips))]
    words = sorted({word for phrase, _ in clips for word in phrase})
    groups = [clips[at : at + GROUP] for at in range(0, len(clips), GROUP)]
    found: dict[str, list[tuple[bool, float]]] = {"own": [], "other": [], "near": []}
    for group, behind in zip(groups, groups[1:] + groups[:1], strict=True):
        own, others = ([phrase for phrase, _ in part] for part in (group, behind))
        for clip in tqdm(group, unit="phrase", leave=False, disable=None):
            near = [changed(p, words, random) if p == clip[0] else p for p in own]
            for kind, phrases in (("own", own), ("other", others), ("near", near)):
                found[kind].append(hear([p for p in phrases if kind == "own" or p != clip[0]],
                                        clip, tokens))  # fmt: skip
    table: list[dict[str, Any]] = []
    for threshold in THRESHOLDS:
        said = {kind: [score < threshold for _, score in found[kind]] for kind in found}
        right = [
            exact for (exact, _), heard in zip(found["own"], said["own"], strict=True) if heard
        ]
        row = {
            "threshold": threshold,
            "false_rejects": 1 - len(right) / len(clips),
            "taken_for_another": (len(right) - sum(right)) / len(clips),
            "false_accepts": sum(said["other"]) / len(clips),
            "false_accepts_one_word_changed": sum(said["near"]) / len(clips),
        }
        table.append(row)
        print(", ".join(f"{key} {value:.3g}" for key, value in row.items()), flush=True)
    if args.output_path:
        about = {
            "model": portable_path(args.model_path or "the English model that ships"),
            "test_data": portable_path(args.test_data),
        }
        result = {"phrases": len(clips), "chosen": UNLIKELY, "table": table}
        write_json(args.output_path, about | provenance(args.command, args.seed) | result)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
