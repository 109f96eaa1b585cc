"""A model on recordings with known texts: accuracy, speed, size and memory as one result."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from asr.common.provenance import commit, portable_path
from asr.corpus.manifest import Utterance, normalise
from asr.corpus.splits import Data, find_sources, places, read_source
from asr.measure.machine import busy_cores, default_threads, describe_machine
from asr.measure.scores import align, by_set, compare, describe_utterance, pick, score, unwritable
from asr.measure.spoken import check_language, spoken
from asr.measure.timing import DEFINITION, measure
from asr.runtime.audio import audio_duration
from asr.runtime.batches import transcribe_many
from asr.runtime.beam import BeamConfig
from asr.runtime.cli import describe
from asr.runtime.recognizer import Recognizer, load
from asr.runtime.tokenizer import Tokenizer

TIMED = 40  # utterances of the speed sample, spread evenly over the durations
Texts = list[str | Exception]  # what was heard, or why a recording cannot be read
Share = Callable[[Sequence[int], Callable[[Sequence[int]], Texts]], Texts]  # see network.processes


def alone(numbers: Sequence[int], read: Callable[[Sequence[int]], Texts]) -> Texts:
    """All the work by this process."""
    return read(numbers)


def evaluate(
    model_path: str | Path, utterances: Sequence[Utterance], batch_size: int = 8,
    threads: int = 0, measure_latency: bool = True, seed: int = 0, beam: BeamConfig | None = None,
    language: str = "", share: Share = alone,
) -> dict[str, Any]:  # fmt: skip
    """Measures a model file on utterances; the keys are those of the result file, JSON types.

    Recordings that cannot be read are `failed` (their `index`, `id`, `error`) and do not count.
    `unwritable` has the characters of the references that the model cannot write, and in how many
    they stand. A model may be `formatted`, write capitals and punctuation: its capitals are not
    compared. With a `language` texts are compared as they are `spoken` in it.

    `threads` 0 means `default_threads`. Speed, `latency_*` in seconds, and `peak_rss` in bytes are
    those of one thread; `speed` has them for one thread and for `threads`. Decoding is greedy
    without `beam`. `share` may divide the recordings between processes. Raises ValueError.
    """
    if not utterances:
        raise ValueError("no utterances to evaluate on")
    threads = threads or default_threads()
    recognizer = load(model_path, threads, beam, min_confidence=0)
    found = transcribe_all(recognizer, utterances, batch_size, share)
    failed = [
        {"index": i, "id": utterances[i].id, "error": describe(text)}
        for i, text in enumerate(found) if isinstance(text, Exception)
    ]  # fmt: skip
    if len(failed) == len(found):
        raise ValueError(f"no recording can be read; the first: {failed[0]['error']}")
    utterances = [u for u, text in zip(utterances, found, strict=True) if isinstance(text, str)]
    texts = [text for text in found if isinstance(text, str)]
    formatted = Tokenizer(recognizer.info.tokens).formatted
    if language:
        utterances = [replace(u, text=spoken(u.text, language)) for u in utterances]
        texts = [spoken(text, language) for text in texts]
    elif formatted:
        texts = [normalise(text) for text in texts]  # as references are read
    result = score(utterances, texts, seed)
    result |= {"failed": failed, "unwritable": unwritable(utterances, recognizer.info.tokens)}
    result["formatted"] = formatted
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
    other: str | Path | None = None, normalize: str = "", share: Share = alone,
) -> dict[str, Any]:  # fmt: skip
    """Measures a `.pt` or `.onnx` file on manifests or LibriSpeech folders; several count as one.

    The result is that of evaluate.py's file: `wer` and `cer` (shares) with intervals, `sets` where
    `data` names several, with `speed` also latency (seconds) and memory (bytes), the `comparison`
    with an `other` result file on the same data, and last the `utterances` with their texts.
    `limit` takes the first so many of each set, `normalize` is the language in which texts are
    compared as they are said, `share` may divide the recordings between processes. Raises
    ValueError.
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
    result = evaluate(
        model_path, utterances, batch_size, threads, speed, seed, beam, normalize, share
    )
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


def without_texts(result: dict[str, Any]) -> dict[str, Any]:
    """A result of `evaluate_data` with the counts of each utterance alone."""
    kept = {key: value for key, value in result.items() if key not in ("confusions", "worst")}
    texts = ("reference", "hypothesis")
    rows = [{k: v for k, v in row.items() if k not in texts} for row in result["utterances"]]
    return kept | {"utterances": rows}


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
    recognizer: Recognizer, utterances: Sequence[Utterance], batch_size: int, share: Share = alone
) -> Texts:
    """The texts in the order of the utterances, or why one cannot be read; in batches."""
    from tqdm import tqdm

    def read(part: Sequence[int]) -> Texts:
        recordings = (recognizer.blocks(utterances[i].audio_filepath) for i in part)
        results = transcribe_many(recognizer, recordings, batch_size)
        bar = tqdm(
            results, total=len(part), desc="transcribing", unit="utt", leave=False, disable=None
        )
        return [result if isinstance(result, Exception) else result.text for result in bar]

    order = sorted(range(len(utterances)), key=lambda i: -utterances[i].duration)
    found = dict(zip(order, share(order, read), strict=True))
    return [found[i] for i in range(len(order))]


def spread(utterances: Sequence[Utterance], most: int) -> list[Utterance]:
    """At most `most` utterances, evenly spaced by duration, shortest and longest included."""
    by_length = sorted(utterances, key=lambda u: u.duration)
    picks = np.linspace(0, len(by_length) - 1, min(most, len(by_length))).round().astype(int)
    return [by_length[i] for i in picks]


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
