"""Measures a model on recordings with known texts: accuracy, speed, size and memory.

    python evaluate.py --model_path model.onnx --test_data data/LibriSpeech/test-clean

Accuracy is corpus WER and CER with bootstrap intervals, from exactly the texts that transcribe.py
writes with --min_confidence 0. Speed and memory are measured in a separate pass, in processes of
their own (`timing`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from asr.common.metrics import (
    bootstrap_interval,
    character_counts,
    common_confusions,
    corpus_rates,
    paired_bootstrap,
    word_counts,
)
from asr.common.provenance import command_line, commit, portable_path
from asr.corpus.manifest import Data, Utterance, find_sources, places, read_source
from asr.measure.machine import busy_cores, busy_note, default_threads, describe_machine
from asr.measure.spoken import check_language, spoken
from asr.measure.timing import DEFINITION, measure
from asr.runtime.audio import audio_duration
from asr.runtime.batches import transcribe_many
from asr.runtime.beam import BeamConfig
from asr.runtime.cli import Parser, describe, guarded
from asr.runtime.files import check_writable, write_json
from asr.runtime.language_model import add_beam_flags, beam_from_flags
from asr.runtime.recognizer import Recognizer, load
from asr.runtime.tokenizer import SPACE, name_character

Row = dict[str, Any]  # an utterance in a result
TIMED = 40  # utterances of the speed sample, spread evenly over the durations
WORST = 10


def evaluate(
    model_path: str | Path, utterances: Sequence[Utterance], batch_size: int = 8,
    threads: int = 0, measure_latency: bool = True, seed: int = 0, beam: BeamConfig | None = None,
    language: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Measures a model file on utterances; the keys are those of the result file, JSON types.

    Recordings that cannot be read are `failed` (their `index`, `id`, `error`) and do not count.
    `unwritable` has the characters of the references that the model cannot write, and in how many
    they stand. With a `language` texts are compared as they are `spoken` in it.

    `threads` 0 means `default_threads`. Speed, `latency_*` in seconds, and `peak_rss` in bytes are
    those of one thread; `speed` has them for one thread and for `threads`. Decoding is greedy
    without `beam`. Raises ValueError.
    """
    if not utterances:
        raise ValueError("no utterances to evaluate on")
    threads = threads or default_threads()
    recognizer = load(model_path, threads, beam, min_confidence=0)
    found = transcribe_all(recognizer, utterances, batch_size)
    failed = [
        {"index": i, "id": utterances[i].id, "error": describe(text)}
        for i, text in enumerate(found) if isinstance(text, Exception)
    ]  # fmt: skip
    if len(failed) == len(found):
        raise ValueError(f"no recording can be read; the first: {failed[0]['error']}")
    utterances = [u for u, text in zip(utterances, found, strict=True) if isinstance(text, str)]
    texts = [text for text in found if isinstance(text, str)]
    if language:
        utterances = [replace(u, text=spoken(u.text, language)) for u in utterances]
        texts = [spoken(text, language) for text in texts]
    result = score(utterances, texts, seed)
    result |= {"failed": failed, "unwritable": unwritable(utterances, recognizer.info.tokens)}
    result |= {"bytes": os.path.getsize(model_path), "params": recognizer.info.parameters}
    if recognizer.info.history:
        result["made_by"] = [made_by(entry) for entry in recognizer.info.history]
    if measure_latency:
        result |= measure_speed(model_path, utterances, sorted({1, threads}), beam)
    return result


def measure_speed(
    model_path: str | Path, utterances: Sequence[Utterance], threads: Sequence[int] = (1,),
    beam: BeamConfig | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What `evaluate` says of speed and memory: `speed` for each number of threads, the first's."""
    sample = spread(utterances, TIMED)
    audio = [u.audio_filepath for u in sample]
    durations = [audio_duration(path) for path in audio]  # a manifest's may be wrong
    speed = [measure(model_path, n, audio, durations, beam=beam) for n in threads]
    first = {key: value for key, value in speed[0].items() if key != "threads"}
    return first | {"speed": speed, "speed_utterances": len(sample)}


def evaluate_data(
    model_path: str | Path, data: Data, *, batch_size: int = 8, threads: int = 0, limit: int = 0,
    seed: int = 0, speed: bool = True, beam: BeamConfig | None = None,
    other: str | Path | None = None, normalize: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Measures a `.pt` or `.onnx` file on manifests or LibriSpeech folders; several count as one.

    The result is that of evaluate.py's file: `wer` and `cer` (shares) with intervals, `sets` where
    `data` names several, with `speed` also latency (seconds) and memory (bytes), the `comparison`
    with an `other` result file on the same data, and last the `utterances` with their texts.
    `limit` takes the first so many of each set, `normalize` is the language in which texts are
    compared as they are said. Raises ValueError.
    """
    if normalize:
        check_language(normalize)
    busy = busy_cores()
    parts = {path: read_test_data(path, limit) for path in places(data)}
    utterances = [utterance for part in parts.values() for utterance in part]
    earlier = read_result(other) if other else None
    if earlier:
        if earlier.get("normalized", "") != normalize:
            raise ValueError(f"{other}: measured with other texts; give the same --normalize")
        said = [replace(u, text=spoken(u.text, normalize)) for u in utterances]
        described = [describe_utterance(u) for u in (said if normalize else utterances)]
        align(described, earlier["utterances"])
    result = evaluate(model_path, utterances, batch_size, threads, speed, seed, beam, normalize)
    rows = result.pop("utterances")
    lost = {row["index"] for row in result["failed"]}
    if len(parts) > 1:
        sizes, at = [], 0
        for path, part in parts.items():
            kept = set(range(at, at + len(part))) - lost
            sizes.append((portable_path(path), len(kept)))
            at += len(part)
        result["sets"] = by_set(rows, sizes, seed)
    if earlier and other:
        gone = [described[i] for i in lost]
        theirs = [row for row in earlier["utterances"] if pick(row) not in map(pick, gone)]
        comparison = compare({"utterances": rows}, {"utterances": theirs}, seed)
        result["comparison"] = comparison | {"other": portable_path(str(other))}
    return result | {
        "model": portable_path(str(model_path)),
        "test_data": " ".join(map(portable_path, parts)),
        "commit": commit(),
        "seed": seed,
        "batch_size": batch_size,
        "normalized": normalize,
        "decoding": describe_decoding(beam) if beam else "greedy",
        "definition": DEFINITION,
        "machine": describe_machine() | {"load_before": busy},
        "utterances": rows,
    }


def describe_decoding(beam: BeamConfig) -> dict[str, Any]:
    """The options of a search, paths as `portable_path` writes them."""
    values = asdict(beam)
    return values | {key: portable_path(values[key]) for key in ("lm", "hotwords", "grammar")}


def made_by(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of a checkpoint's history, paths as `portable_path` writes them."""
    config = {
        key: portable_path(value) if isinstance(value, str) else value
        for key, value in entry.get("config", {}).items()
    }
    return entry | ({"config": config} if config else {})


def transcribe_all(
    recognizer: Recognizer, utterances: Sequence[Utterance], batch_size: int
) -> list[str | Exception]:
    """The texts in the order of the utterances, or why one cannot be read; in batches."""
    from tqdm import tqdm

    order = sorted(range(len(utterances)), key=lambda i: -utterances[i].duration)
    recordings = (recognizer.blocks(utterances[i].audio_filepath) for i in order)
    results = transcribe_many(recognizer, recordings, batch_size)
    bar = tqdm(
        results, total=len(order), desc="transcribing", unit="utt", leave=False, disable=None
    )
    texts: list[str | Exception] = [""] * len(order)
    for i, result in zip(order, bar, strict=True):
        texts[i] = result if isinstance(result, Exception) else result.text
    return texts


def unwritable(utterances: Sequence[Utterance], tokens: Sequence[str]) -> dict[str, int]:
    """The characters of the texts that no token has, and in how many texts, the most first."""
    known = set("".join(tokens[1:])) - {SPACE} | {" "}
    counts = Counter(c for u in utterances for c in set(u.text) - known)
    return {name_character(c): n for c, n in counts.most_common()}


def score(utterances: Sequence[Utterance], texts: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Rates with their intervals, every utterance's counts and texts, the worst, the confusions."""
    references = [u.text for u in utterances]
    words = [word_counts(r, h) for r, h in zip(references, texts, strict=True)]
    characters = [character_counts(r, h) for r, h in zip(references, texts, strict=True)]
    result = corpus_rates(words, characters)
    for name, counts in (("wer", words), ("cer", characters)):
        errors, totals = [sum(c[:3]) for c in counts], [c[3] for c in counts]
        result[f"{name}_interval"] = list(bootstrap_interval(errors, totals, seed=seed))
    rows: list[Row] = [
        describe_utterance(u) | {
            "word_errors": sum(w[:3]), "characters": c[3], "character_errors": sum(c[:3]),
            "reference": u.text, "hypothesis": text, "digest": digest(text),
        }
        for u, text, w, c in zip(utterances, texts, words, characters, strict=True)
    ]  # fmt: skip
    worst = sorted(rows, key=lambda r: (-r["word_errors"], -r["character_errors"], r["id"]))
    return result | {
        "seconds": round(sum(u.duration for u in utterances), 3),
        "worst": [r for r in worst[:WORST] if r["word_errors"]],
        "confusions": common_confusions(references, texts),
        "utterances": rows,
    }


def by_set(
    rows: Sequence[Row], sets: Sequence[tuple[str, int]], seed: int = 0
) -> list[dict[str, Any]]:
    """The rates of each test set, given its name and how many of the rows, in order, are its."""
    found, at = [], 0
    for name, count in sets:
        part, at = rows[at : at + count], at + count
        entry: dict[str, Any] = {"test_data": name, "utterances": count}
        for rate, unit in (("wer", "word"), ("cer", "character")):
            errors, totals = ([row[k] for row in part] for k in (f"{unit}_errors", f"{unit}s"))
            entry |= {
                f"{unit}s": sum(totals), rate: sum(errors) / max(sum(totals), 1),
                f"{rate}_interval": list(bootstrap_interval(errors, totals, seed=seed)),
            }  # fmt: skip
        found.append(entry)
    return found


def digest(text: str) -> str:
    """Tells texts apart in results that must not hold them."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def spread(utterances: Sequence[Utterance], most: int) -> list[Utterance]:
    """At most `most` utterances, evenly spaced by duration, shortest and longest included."""
    by_length = sorted(utterances, key=lambda u: u.duration)
    picks = np.linspace(0, len(by_length) - 1, min(most, len(by_length))).round().astype(int)
    return [by_length[i] for i in picks]


def compare(result: dict[str, Any], other: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Paired comparison of two results on the same utterances; positive deltas: `other` is better.

    Raises ValueError where the utterances are not the same ones.
    """
    mine, theirs = align(result["utterances"], other["utterances"])
    out: dict[str, Any] = {}
    for name, unit in (("wer", "word"), ("cer", "character")):
        errors, others = ([row[f"{unit}_errors"] for row in rows] for rows in (mine, theirs))
        totals = [row[f"{unit}s"] for row in mine]
        out[name] = paired_bootstrap(errors, others, totals, seed=seed)
    if all("digest" in row for row in (*mine, *theirs)):
        same = [a["digest"] == b["digest"] for a, b in zip(mine, theirs, strict=True)]
        out["identical"] = sum(same) / len(same)
    return out | {"utterances": len(mine)}


def pick(row: Row) -> tuple[str, int]:
    """What tells an utterance in two results."""
    return row["id"], row["words"]


def align(rows: Sequence[Row], others: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Both sorted alike; ValueError where they are not of the same utterances."""
    mine, theirs = (
        sorted(part, key=lambda row: (row["id"], row["duration"], row["words"]))
        for part in (rows, others)
    )
    if [(row["id"], row["words"]) for row in mine] != [(row["id"], row["words"]) for row in theirs]:
        raise ValueError("the two results are not of the same utterances; evaluate both on one set")
    return mine, theirs


def describe_utterance(utterance: Utterance) -> Row:
    """What identifies an utterance in a result."""
    return {
        "id": utterance.id,
        "duration": round(utterance.duration, 3),
        "words": len(utterance.text.split()),
    }


def read_test_data(path: str | Path, limit: int = 0) -> list[Utterance]:
    """The utterances of a manifest or LibriSpeech folder; of several splits, those named test*.

    With a `limit`, the first so many.
    """
    sources = find_sources(path)
    if len(sources) > 1:
        tests = {name: p for name, p in sources.items() if name.lower().startswith("test")}
        if not tests:
            raise ValueError(
                f"{path}: several splits ({', '.join(sources)}) and none named test*; name one"
            )
        sources = tests
    return [utterance for p in sources.values() for utterance in read_source(p)][: limit or None]


def read_result(path: str | Path) -> dict[str, Any]:
    """A result file of evaluate.py; ValueError for anything else."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such result file; evaluate.py writes one") from None
    except ValueError:
        raise ValueError(f"{path}: not a JSON file; name a result of evaluate.py") from None
    if not isinstance(result, dict) or not isinstance(result.get("utterances"), list):
        raise ValueError(f"{path}: not a result of evaluate.py")
    return result


def report(result: dict[str, Any]) -> str:
    """What evaluate.py prints."""
    low, high = result["wer_interval"]
    clow, chigh = result["cer_interval"]
    lines = [
        f"{len(result['utterances'])} utterances, {result['words']} words, "
        f"{result['seconds'] / 60:.1f} min",
        f"WER {result['wer']:.2%}  (95 % interval {low:.2%} to {high:.2%}; "
        f"{result['substitutions']} substitutions, {result['insertions']} insertions, "
        f"{result['deletions']} deletions)",
        f"CER {result['cer']:.2%}  ({clow:.2%} to {chigh:.2%})",
        f"{result['bytes'] / 1e6:.2f} MB, {result['params'] / 1e6:.2f} M parameters",
    ]
    for speed in result.get("speed", []):
        lines.append(
            f"{speed['threads']} thread{'s' * (speed['threads'] > 1)}: RTF {speed['rtf']:.4f}, "
            f"latency p50 {1e3 * speed['latency_p50']:.0f} ms, p95 "
            f"{1e3 * speed['latency_p95']:.0f} ms, peak memory {speed['peak_rss'] / 1e6:.0f} MB"
        )
    if "speed" in result:
        lines.append(f"  {DEFINITION}; medians over {result['speed_utterances']} utterances")
    for part in result.get("sets", []):
        low, high = part["wer_interval"]
        lines.append(
            f"{part['test_data']}: {part['utterances']} utterances, {part['words']} words, "
            f"WER {part['wer']:.2%} ({low:.2%} to {high:.2%}), CER {part['cer']:.2%}"
        )
    if result.get("unwritable"):
        names = [f"{name} in {n}" for name, n in result["unwritable"].items()]
        lines.append(
            f"note: references hold characters that the model cannot write: "
            f"{', '.join(names[:10])}{', …' * (len(names) > 10)}"
        )
        if not result.get("normalized"):
            lines.append("  --normalize leaves out punctuation and turns numbers into words")
    if result["worst"]:
        lines.append("worst utterances")
    for row in result["worst"]:
        lines.append(f"  {row['id']}: {row['word_errors']} errors in {row['words']} words")
        lines.append(f"    said  {row['reference'] or '(nothing)'}")
        lines.append(f"    heard {row['hypothesis'] or '(nothing)'}")
    if result["confusions"]:
        lines.append("most frequent errors (said > heard)")
        pairs = [f"{a or '-'} > {b or '-'} {n}x" for a, b, n in result["confusions"]]
        lines.append("  " + ", ".join(pairs))
    return "\n".join(lines)


def report_comparison(comparison: dict[str, Any], other: str) -> str:
    """The printed form of `compare`."""
    lines = [f"against {other}, {comparison['utterances']} utterances"]
    for name in ("wer", "cer"):
        c = comparison[name]
        low, high = c["interval"]
        lines.append(
            f"  delta {name.upper()} {100 * c['delta']:+.2f} points (95 % interval "
            f"{100 * low:+.2f} to {100 * high:+.2f}; lower in {c['better']:.0%} of draws)"
        )
    if "identical" in comparison:
        lines.append(f"  identical texts {comparison['identical']:.1%}")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_path", required=True, help="a .pt checkpoint or an .onnx export")
    add("--test_data", required=True, nargs="+",
        help="manifests, LibriSpeech folders; several count as one")  # fmt: skip
    add("--output_file", "--output_path", metavar="FILE",
        help="JSON with all results; folders are made")  # fmt: skip
    add("--batch_size", type=int, default=8, help="utterances at once (default: 8)")
    add("--threads", type=int, default=0,
        help="processor threads (default: the idle cores but one, at least 1)")  # fmt: skip
    add("--limit", type=int, default=0, help="only the first so many of each set (default: all)")
    add("--seed", type=int, default=0, help="seed of the bootstrap (default: 0)")
    add(
        "--normalize",
        nargs="?",
        const="en",
        default="",
        metavar="LANGUAGE",
        help="compare words only: no capitals, no punctuation, numbers in words (of en; or fr, …)",
    )
    add("--compare", metavar="RESULT", help="an earlier result on the same data: paired bootstrap")
    add("--no_speed", action="store_true", help="leave speed and memory out")
    add("--no_texts", action="store_true", help="write no texts to the file, only their counts")
    add_beam_flags(parser)
    args = parser.parse_args(argv)
    for name, least in (("batch_size", 1), ("threads", 0), ("limit", 0), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)} must be at least {least}")
    args.command = command_line("evaluate.py", argv)
    return args


def run(args: argparse.Namespace) -> int:
    if args.output_file:
        check_writable(args.output_file)
    result = evaluate_data(
        args.model_path, args.test_data, batch_size=args.batch_size, threads=args.threads,
        limit=args.limit, seed=args.seed, speed=not args.no_speed, beam=beam_from_flags(args),
        other=args.compare, normalize=args.normalize,
    )  # fmt: skip
    texts = [report(result)]
    busy = result["machine"]["load_before"]
    if not args.no_speed and busy_note(busy):
        texts.append(busy_note(busy))
    rows = result.pop("utterances")
    result["command"] = args.command
    if args.compare:
        texts.append(report_comparison(result["comparison"], args.compare))
    if args.no_texts:
        del result["confusions"], result["worst"]
        rows = [{k: v for k, v in r.items() if k not in ("reference", "hypothesis")} for r in rows]
    if args.output_file:
        write_json(args.output_file, result | {"utterances": rows})
        texts.append(f"written to {args.output_file}")
    print("\n".join(texts))
    for row in result["failed"]:
        print(f"error: {row['id']}: {row['error']}", file=sys.stderr)
    if result["failed"]:
        count = len(rows) + len(result["failed"])
        print(f"{len(result['failed'])} of {count} recordings do not count", file=sys.stderr)
    return 2 if result["failed"] else 0


def main(argv: list[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))
