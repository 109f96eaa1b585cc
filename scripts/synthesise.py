"""Speak sentences: speech to train on where recordings are few, in the voices of Kokoro-82M.

Set up as `scripts/kokoro_voices.py` says, then, for three hours of speech (two of computing on two
cores; a second call goes on, with more --hours beyond what is there):

V/bin/python scripts/synthesise.py --voices package/voices --text sentences.txt --hours 3 \\
    --exclude data/LibriSpeech/test-clean.json --output_dir data/synthetic

Every sentence has a blend of two voices, a speed, mostly a small room, and noise. What is said how
follows from --seed alone; the vocoder draws its own noise.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asr.augment import Array, coloured_noise
from asr.cli import guarded, number
from asr.manifest import Utterance, write_manifest
from asr.transcripts import Line, read_lines, without, words_of
from scripts.kokoro_voices import MAX_SYMBOLS, RATE, Kokoro, phonemes_of, trim

LETTERS_A_SECOND = 15  # about, to plan how many sentences make so many hours
LETTERS = (20, 220)  # of a sentence: up to about 15 s
ACCENTS = ("af", "am", "bf", "bm")  # the beginnings of Kokoro's English voices


class Saying(NamedTuple):
    """One sentence and how it is said."""

    name: str
    text: str
    voice: str  # "af_heart:0.6,am_onyx:0.4"
    speed: float


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = argparse.ArgumentParser(
        description="Speaks sentences in many voices: a training set without recordings."
    )
    add = parser.add_argument
    add("--text", nargs="+", required=True, metavar="PATH",
        help="sentences: plain text, transcripts, manifests")  # fmt: skip
    add("--exclude", nargs="+", default=[], metavar="PATH", help="texts whose sentences stay out")
    add("--voices", required=True, help="folder of Kokoro's voices (*.bin)")
    add("--output_dir", required=True, help="folder for the speech and its manifest train.json")
    add("--hours", type=number, default=1.0, help="speech to make (default: 1)")
    add("--jobs", type=int, default=2, help="processes (default: 2)")
    add("--seed", type=int, default=0, help="of the order, voices, rooms and noise (default: 0)")
    return parser.parse_args(argv)


def find_voices(folder: str) -> list[str]:
    """The English voices in a folder; a ValueError if there are none."""
    names = sorted(p.stem for p in Path(folder).glob("*.bin") if p.stem[:2] in ACCENTS)
    if not names:
        raise ValueError(f"{folder}: no English voices (af_*.bin and the like); "
                         "scripts/kokoro_voices.py says where they come from")  # fmt: skip
    return names


def make_plan(
    lines: Sequence[Line], voices: Sequence[str], hours: float, seed: int
) -> list[Saying]:
    """Sentences of about so many hours, in random order; a longer plan begins like a shorter."""
    texts = dict.fromkeys(" ".join(words_of(line.text)) for line in lines)
    fitting = [text for text in texts if LETTERS[0] <= len(text) <= LETTERS[1]]
    random.Random(seed).shuffle(fitting)
    plan: list[Saying] = []
    letters = 0
    for index, text in enumerate(fitting):
        if letters >= hours * 3600 * LETTERS_A_SECOND:
            break
        letters += len(text)
        rng = random.Random(f"{seed} {text}")
        first = rng.choice(voices)
        second = rng.choice([voice for voice in voices if voice[0] == first[0]])  # of one accent
        share = rng.randint(5, 10)
        voice = f"{first}:{share / 10},{second}:{1 - share / 10:.1f}"
        plan.append(Saying(f"{index:06d}", text, voice, round(rng.uniform(0.85, 1.2), 2)))
    if not plan:
        raise ValueError(f"no sentence of {LETTERS[0]} to {LETTERS[1]} letters to speak")
    return plan


def in_room(samples: Array, rng: np.random.Generator) -> Array:
    """The samples (N,) with the echoes of a small room: noise that decays by 60 dB in 0.1 to 0.5 s,
    with the power of the direct sound's hundredth to fourth part."""
    length = int(RATE * rng.uniform(0.1, 0.5))
    response = rng.standard_normal(length) * 10 ** (-3 * np.arange(length) / length)
    response *= rng.uniform(0.1, 0.5) / np.sqrt((response**2).sum())
    response[0] = 1
    size = len(samples) + length
    spectrum = np.fft.rfft(samples, size) * np.fft.rfft(response, size)
    return np.fft.irfft(spectrum, size)[: len(samples)].astype(np.float32)


def roughen(samples: Array, rng: np.random.Generator) -> Array:
    """What a microphone might make of clean speech (N,): a room, noise, another level."""
    if rng.random() < 0.7:
        samples = in_room(samples, rng)
    samples = samples + coloured_noise(samples, rng.uniform(10, 40), rng)
    peak = 10 ** (rng.uniform(-20, -1) / 20)
    return samples * np.float32(peak / np.abs(samples).max())


def synthesise(job: tuple[list[Saying], list[str], str, Path, int]) -> None:
    """Writes one share of the plan as 16 kHz FLAC; what is there already is kept."""
    plan, phonemes, voices, folder, seed = job
    model = Kokoro(Path(voices))
    for done, (saying, spoken) in enumerate(zip(plan, phonemes, strict=True)):
        target = folder / f"{saying.name}.flac"
        if target.exists() or len(spoken) > MAX_SYMBOLS:
            continue
        samples = trim(model.say(spoken, saying.voice, saying.speed)).astype(np.float32)
        samples = roughen(samples, np.random.default_rng([seed, int(saying.name)]))
        soundfile.write(target.with_suffix(".part"), samples, RATE, format="FLAC")
        target.with_suffix(".part").rename(target)
        if done % 50 == 0:
            print(f"{done}/{len(plan)}", flush=True)


def speak(plan: Sequence[Saying]) -> list[str]:
    """The phonemes of each sentence, British for British voices."""
    phonemes: dict[str, str] = {}
    for british in (False, True):
        mine = [saying for saying in plan if (saying.voice[0] == "b") == british]
        spoken = phonemes_of([f"{saying.text}." for saying in mine], british) if mine else []
        phonemes |= dict(zip((saying.name for saying in mine), spoken, strict=True))
    return [phonemes[saying.name] for saying in plan]


def collect(plan: Sequence[Saying], folder: Path) -> list[Utterance]:
    """The sentences that have been spoken."""
    found = []
    for saying in plan:
        path = folder / f"{saying.name}.flac"
        if path.exists():
            found.append(
                Utterance(str(path), soundfile.info(path).duration, saying.text,
                          f"kokoro-{saying.voice}", saying.name)
            )  # fmt: skip
    return found


def run(args: argparse.Namespace) -> int:
    """Plans, speaks and writes the manifest."""
    voices = find_voices(args.voices)
    lines = [line for path in args.text for line in read_lines(path)]
    for path in args.exclude:
        before = len(lines)
        lines = without(lines, read_lines(path))
        print(f"left out {before - len(lines)} sentences of {path}")
    plan = make_plan(lines, voices, args.hours, args.seed)
    folder = Path(args.output_dir).absolute() / "audio"
    folder.mkdir(parents=True, exist_ok=True)
    phonemes = speak(plan)
    jobs = [
        (plan[i :: args.jobs], phonemes[i :: args.jobs], args.voices, folder, args.seed)
        for i in range(args.jobs)
    ]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        pool.map(synthesise, jobs, chunksize=1)
    spoken = collect(plan, folder)
    manifest = Path(args.output_dir) / "train.json"
    write_manifest(manifest, spoken, relative_to=args.output_dir)
    hours = sum(u.duration for u in spoken) / 3600
    print(f"{manifest}: {len(spoken)} sentences, {hours:.2f} h")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parse_args(argv)
    return guarded(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
