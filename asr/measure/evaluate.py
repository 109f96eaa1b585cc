"""Measures a model on recordings with known texts: accuracy, speed, size and memory.

    python evaluate.py --model_path model.onnx --test_data data/LibriSpeech/test-clean

Accuracy is corpus WER and CER with bootstrap intervals, from exactly the texts that transcribe.py
writes with --min_confidence 0. Speed and memory are measured in a separate pass, in processes of
their own (`timing`). Under torchrun each process reads a part of the recordings.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from asr.common.provenance import command_line
from asr.measure.evaluation import Share, alone, evaluate_data, without_texts
from asr.measure.machine import busy_note
from asr.measure.timing import DEFINITION
from asr.runtime.cli import Parser, guarded
from asr.runtime.files import check_writable, write_json
from asr.runtime.language_model import add_beam_flags, beam_from_flags


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
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return measure(args)
    from asr.network import processes  # torch, which an .onnx does without

    with processes.process_group("cpu"):
        return measure(args, processes.share, processes.is_first())


def measure(args: argparse.Namespace, share: Share = alone, first: bool = True) -> int:
    """Measures, prints and writes; a process that is not the first does its share of the texts."""
    if args.output_file:
        check_writable(args.output_file)
    result = evaluate_data(
        args.model_path, args.test_data, batch_size=args.batch_size, threads=args.threads,
        limit=args.limit, seed=args.seed, speed=first and not args.no_speed,
        beam=beam_from_flags(args), other=args.compare, normalize=args.normalize, share=share,
    )  # fmt: skip
    if not first:
        return 0
    texts = [report(result)]
    busy = result["machine"]["load_before"]
    if not args.no_speed and busy_note(busy):
        texts.append(busy_note(busy))
    if args.no_texts:
        result = without_texts(result)
    rows = result.pop("utterances")
    result["command"] = args.command
    if args.compare:
        texts.append(report_comparison(result["comparison"], args.compare))
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
    if result.get("formatted") and not result.get("normalized"):
        lines.append(
            "note: this model writes capitals and punctuation; capitals are not compared, "
            "punctuation is: --normalize compares words alone"
        )
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


def main(argv: list[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))
