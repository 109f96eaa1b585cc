"""Makes data/mini, the built-in corpus of synthetic speech (own sentences, Kokoro-82M voices).

From the repository root, in the environment that `scripts/synthesise.py` describes (about 20
minutes on two cores; a second call resumes):

    V/bin/python data/make_mini_corpus.py --voices package/voices --jobs 2

The sentences, voices, speeds and gains follow from --seed alone. The vocoder draws its own noise,
so a second synthesis sounds the same but is not the same byte for byte.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asr.runtime.cli import Parser, guarded
from scripts.synthesise import PAD, RATE, Kokoro, name_of, phonemes_of, trim

MAX_BYTES = 8_000_000
MIN_COUNT = 15  # every word occurs at least this often in train
SIZES = {"train": 1340, "dev": 120, "test": 180}  # sentences
SECOND_VOICE = 160  # train sentences spoken by two voices
N_BLENDS = 24

GRAMMAR = Path(__file__).resolve().parent.parent / "data" / "mini" / "grammar.txt"


def read_grammar() -> dict[str, list[str]]:
    """Return the lines of each [section] of the grammar."""
    sections: dict[str, list[str]] = {}
    rows: list[str] = []
    for line in GRAMMAR.read_text().splitlines():
        if line.startswith("["):
            rows = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            rows.append(line)
    return sections


def lists(rows: list[str]) -> dict[str, list[str]]:
    """Read lines of the form "name = one|two|three"."""
    return {name: items.split("|") for name, items in (row.split(" = ") for row in rows)}


def weights(rows: list[str]) -> dict[str, int]:
    """Read lines of the form "3 some text"."""
    return {text: int(weight) for weight, text in (row.split(" ", 1) for row in rows)}


SECTIONS = read_grammar()
VOICES, SLOTS = lists(SECTIONS["voices"]), lists(SECTIONS["slots"])
TEMPLATES, PREFIXES, SUFFIXES = (
    weights(SECTIONS[name]) for name in ("templates", "prefixes", "suffixes")
)


def fill(template: str, rng: random.Random) -> str:
    """Replace each {slot} by one of its fillings, slots within fillings included."""
    while slot := re.search(r"{(\w+)}", template):
        filling = rng.choice(SLOTS[slot[1]])
        template = template[: slot.start()] + filling + template[slot.end() :]
    return template


def weighted(options: dict[str, int], rng: random.Random) -> str:
    """Draw one key with its weight."""
    return rng.choices(list(options), list(options.values()))[0]


def draw(templates: dict[str, int], rng: random.Random) -> str:
    """Make one sentence of 2 to 9 words from a random template."""
    while True:
        words = fill(weighted(templates, rng), rng).split()
        if words[0] in SLOTS["command"]:
            if rng.random() < 0.25:
                words = weighted(PREFIXES, rng).split() + words
            elif rng.random() < 0.25:
                words = words + weighted(SUFFIXES, rng).split()
        nouns = [w for w in words if w not in SLOTS["digit"] and len(w) > 3]
        if 2 <= len(words) <= 9 and len(nouns) == len(set(nouns)):
            return " ".join(words)


def rarity(sentence: str, counts: Counter[str]) -> float:
    """Score how much a sentence helps the words that are still rare, shorter ones first."""
    words = sorted(set(sentence.split()))
    return sum((1 + counts[w]) ** -1.5 for w in words) / len(sentence)


def make_sentences(seed: int) -> dict[str, list[str]]:
    """Write the sentences of each split: disjoint, with the words of train spread evenly."""
    rng = random.Random(seed)
    phrases = list(SECTIONS["phrases"])
    rng.shuffle(phrases)
    # A fifth of dev and test is hand-written phrases, and some of the templates are theirs alone.
    parts = {"dev": phrases[:24], "test": phrases[24:60], "train": phrases[60:]}
    rare_templates = [t for t, n in TEMPLATES.items() if n == 1]
    rng.shuffle(rare_templates)
    held = {"dev": rare_templates[:3], "test": rare_templates[3:9]}
    common = {t: n for t, n in TEMPLATES.items() if t not in held["dev"] + held["test"]}
    used: set[str] = set(phrases)
    for split in ("dev", "test", "train"):
        counts = Counter(w for s in parts[split] for w in s.split())
        while len(parts[split]) < SIZES[split]:
            own = held.get(split, [])
            # A third of the generated dev and test sentences has a shape that train has not.
            pool = dict.fromkeys(own, 1) if own and rng.random() < 0.33 else common
            options = [s for s in (draw(pool, rng) for _ in range(40)) if s not in used]
            if split == "train":  # the rarest word is in it, if it can be
                rare = min(counts, key=counts.__getitem__)
                options = [s for s in options if rare in s.split()] or options
            if not options:
                continue
            # The option with the rarest words wins: this evens out the counts.
            best = max(options, key=lambda s: rarity(s, counts))
            used.add(best)
            counts.update(best.split())
            parts[split].append(best)
        rng.shuffle(parts[split])
    # "he need" came out of a slot that holds "we" as well.
    return {s: [re.sub(r"\b(s?he) need\b", r"\1 will need", x) for x in parts[s]] for s in SIZES}


def make_plan(seed: int) -> list[dict[str, Any]]:
    """Give each sentence its voice or voices, speed and peak level: one entry per utterance."""
    rng = random.Random(seed + 1)
    train = VOICES["train"]
    blends: set[str] = set()
    while len(blends) < N_BLENDS:
        first, second = rng.sample(train, 2)
        if first[0] == second[0] or rng.random() < 0.3:  # mostly of one accent
            share = rng.choice([4, 5, 6])
            blends.add(f"{first}:0.{share},{second}:0.{10 - share}")
    speakers = dict(VOICES, train=train + sorted(blends))
    sentences = make_sentences(seed)
    plan: list[dict[str, Any]] = []

    def add(split: str, texts: list[str]) -> None:
        """Deal the voices out like cards, so that each speaks about as much as the others."""
        deck: list[str] = []
        taken = {(item["text"], item["voice"]) for item in plan}
        first = sum(item["split"] == split for item in plan)
        low, high = (0.85, 1.15) if split == "train" else (0.92, 1.08)
        for i, text in enumerate(texts, first):
            if not deck:
                deck = rng.sample(speakers[split], len(speakers[split]))
            voice = next((v for v in deck if (text, v) not in taken), deck[0])
            deck.remove(voice)
            taken.add((text, voice))
            name = re.sub(r"(\w+):0.(\d),(\w+):0.\d", r"\1\2_\3", voice)
            plan.append(
                {
                    "path": f"{split}/{name}/{i:04d}.opus",
                    "split": split,
                    "text": text,
                    "voice": voice,
                    "speaker": name,
                    "speed": round(rng.uniform(low, high), 2),
                    "peak": round(10 ** (rng.uniform(-10, -2) / 20), 3),
                }
            )

    add("train", sentences["train"] + rng.sample(sentences["train"], SECOND_VOICE))
    add("dev", sentences["dev"])
    add("test", sentences["test"])
    # Words that are still rare in train get a few sentences in another voice.
    counts = Counter(w for item in plan if item["split"] == "train" for w in item["text"].split())
    extra: list[str] = []
    while min(counts.values()) < MIN_COUNT + 3:
        rare = min(counts, key=counts.__getitem__)
        options = [s for s in sentences["train"] if rare in s.split() and s not in extra]
        extra.append(max(options, key=lambda s: rarity(s, counts)))
        counts.update(extra[-1].split())
    add("train", extra)
    return plan


def punctuate(text: str) -> str:
    """Add the marks that steer the melody: a final stop or question mark, commas in numbers."""
    digit = f"(?:{'|'.join(SLOTS['digit'])})"
    text = re.sub(rf"\b({digit}(?: {digit}){{2}}) (?={digit})", r"\1, ", text)
    return text + ("?" if text.split()[0] in SLOTS["asking"] else ".")


def to_phonemes(texts: list[str], british: bool) -> dict[str, str]:
    """Turn the sentences into phoneme strings in one batch."""
    spoken = phonemes_of([punctuate(t) for t in texts], british)
    fixed = [re.sub("klˈ(oʊ|əʊ)s ", r"klˈ\1z ", p) for p in spoken]
    return dict(zip(texts, fixed, strict=True))  # "close" is a verb in all of the sentences


def wav_of(item: dict[str, Any], work: Path) -> Path:
    """Where an utterance of the plan is spoken to; another sentence or voice has another name."""
    return work / f"{name_of(*item.values())}.wav"


def synthesise(job: tuple[list[dict[str, Any]], dict[str, dict[str, str]], Path, Path]) -> None:
    """Speak one share of the plan into 16 kHz WAV files; those already there are kept."""
    plan, phonemes, voices, work = job
    model = Kokoro(voices)
    for done, item in enumerate(plan):
        target = wav_of(item, work)
        if target.exists():
            continue
        spoken = phonemes[item["voice"][0]][item["text"]]
        samples = trim(model.say(spoken, item["voice"], item["speed"]))
        samples *= item["peak"] / np.abs(samples).max()
        target.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(target.with_suffix(".part"), samples, RATE, format="WAV", subtype="PCM_16")
        target.with_suffix(".part").rename(target)
        if done % 50 == 0:
            print(f"{done}/{len(plan)}", flush=True)


def outliers(plan: list[dict[str, Any]], work: Path) -> set[str]:
    """Listen by machine: return the paths whose length or level is out of the ordinary."""
    bad = set()
    lengths, phones = [], []
    for item in plan:
        samples, _ = soundfile.read(wav_of(item, work), dtype="float32")
        speech = len(samples) / RATE - 2 * PAD
        rms = float(np.sqrt((samples**2).mean()))
        if not np.isfinite(samples).all() or rms < 0.005 or np.abs(samples).max() > 0.999:
            bad.add(item["path"])
        lengths.append(math.log(max(speech, 0.01) * item["speed"]))
        phones.append(math.log(len(item["text"]) + 4))
    # Length against letters, on a log scale; each voice has its own pace, so it is taken out.
    slope, offset = np.polyfit(phones, lengths, 1)
    rest = np.array(lengths) - slope * np.array(phones) - offset
    voices = np.array([item["voice"] for item in plan])
    for voice in set(voices):
        rest[voices == voice] -= np.median(rest[voices == voice])
    for item, error in zip(plan, rest, strict=True):
        if abs(error) > 0.5:  # 1.65 times too long, or too short
            bad.add(item["path"])
            print(f"outlier {error:+.2f}: {item['path']} {item['text']}")
    return bad


def encode(plan: list[dict[str, Any]], work: Path, out: Path, level: float) -> None:
    """Write the Opus files and the manifests; check that each file reads back whole.

    An Opus file is kept where the manifest that is there has the plan's sentence for it.
    """
    lines: dict[str, list[str]] = {split: [] for split in SIZES}
    manifests = [m for split in SIZES if (m := out / f"{split}.json").exists()]
    rows = [json.loads(line) for m in manifests for line in m.read_text().splitlines() if line]
    planned = {(item["path"], item["text"]) for item in plan}
    kept = {out / r["audio_filepath"] for r in rows if (r["audio_filepath"], r["text"]) in planned}
    for stale in set(out.rglob("*.opus")) - kept:
        stale.unlink()
    for item in plan:
        samples, _ = soundfile.read(wav_of(item, work), dtype="float32")
        target = out / item["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            soundfile.write(
                target, samples, RATE, format="OGG", subtype="OPUS", compression_level=level
            )
        back, rate = soundfile.read(target, dtype="float32")
        if rate != RATE or len(back) != len(samples) or np.abs(back).max() > 0.999:
            raise ValueError(f"{target} does not read back as written; remove it and try again")
        entry = {
            "audio_filepath": item["path"],
            "duration": round(len(back) / RATE, 3),
            "text": item["text"],
            "speaker": item["speaker"],
        }
        lines[item["split"]].append(json.dumps(entry))
    for split, rows in lines.items():
        (out / f"{split}.json").write_text("\n".join(rows) + "\n")


def verify(out: Path) -> None:
    """Check the promises of the README against the files, and print its table."""
    rows = {s: [json.loads(x) for x in (out / f"{s}.json").read_text().splitlines()] for s in SIZES}
    words = {s: Counter(w for r in rows[s] for w in r["text"].split()) for s in SIZES}
    for one, two in (("train", "dev"), ("train", "test"), ("dev", "test")):
        for key in ("text", "audio_filepath"):
            assert not {r[key] for r in rows[one]} & {r[key] for r in rows[two]}, (one, two, key)
        assert not set(VOICES[one]) & set(VOICES[two])
    for split in SIZES:
        assert all(re.fullmatch(r"[a-z']+( [a-z']+){1,8}", r["text"]) for r in rows[split])
        if split != "train":
            assert {r["speaker"] for r in rows[split]} == set(VOICES[split])
            assert set(words[split]) <= set(words["train"])
    listed = {r["audio_filepath"] for split in SIZES for r in rows[split]}
    found = {str(p.relative_to(out)) for p in out.rglob("*.opus")}
    assert listed == found, sorted(listed ^ found)[:5]
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    assert size <= MAX_BYTES, size
    print("| split | utterances | sentences | minutes | speakers | running words | distinct |")
    print("|---|---|---|---|---|---|---|")
    for s in SIZES:
        minutes = sum(r["duration"] for r in rows[s]) / 60
        texts, speakers = ({r[k] for r in rows[s]} for k in ("text", "speaker"))
        print(
            f"| {s} | {len(rows[s])} | {len(texts)} | {minutes:.1f} | {len(speakers)} "
            f"| {words[s].total()} | {len(words[s])} |"
        )
    word, count = words["train"].most_common()[-1]
    print(f"{size} bytes; rarest word in train: {word}, {count} times")
    if count < MIN_COUNT:
        raise SystemExit(f"every word should occur {MIN_COUNT} times in train")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--voices", type=Path, help="folder of Kokoro voices (*.bin)")
    add("--output_dir", type=Path, default=Path("data/mini"), help="the corpus (%(default)s)")
    add(
        "--work", type=Path, default=Path("build/mini_work"), help="WAV files go here (%(default)s)"
    )
    add("--jobs", type=int, default=2, help="processes (%(default)s)")
    add("--seed", type=int, default=7, help="of sentences, voices, speeds, gains (%(default)s)")
    add("--level", type=float, default=0.967, help="Opus compression, 0 to 1 (%(default)s)")
    add("--spoken", action="store_true", help="encode what is spoken so far")
    add("--verify", action="store_true", help="only check what is there")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Makes the corpus: plan, synthesise, check, encode, verify."""
    if not args.verify:
        plan = make_plan(args.seed)
        plan.sort(key=lambda item: item["split"])  # dev and test first
        if args.spoken:
            plan = [item for item in plan if wav_of(item, args.work).exists()]
        else:
            texts = sorted({item["text"] for item in plan})
            phonemes = {"a": to_phonemes(texts, False), "b": to_phonemes(texts, True)}
            shares = [plan[i :: args.jobs] for i in range(args.jobs)]
            jobs = [(share, phonemes, args.voices, args.work) for share in shares]
            with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
                pool.map(synthesise, jobs, chunksize=1)
        bad = outliers(plan, args.work)
        print(f"{len(bad)} outliers left out")
        encode([p for p in plan if p["path"] not in bad], args.work, args.output_dir, args.level)
    verify(args.output_dir)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
