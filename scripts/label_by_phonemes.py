"""Writes texts for recordings that have none, by phonemes, a lexicon and a language model.

    python scripts/label_by_phonemes.py --teacher hama_wheel/hama/assets/asr_waveform.hama \\
        --lexicon lexicon.tsv --lm english.lm --data_dir unlabelled.json --output_path phonemes.json

The recogniser of the wheel `hama` 1.7.0 knows more voices than a small model of ours; together with
the words that a lexicon has, it is a second opinion for scripts/label_speech.py --agree_with. A run
that was stopped goes on: the same command again. --test_data tells its error rate.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from asr.common.metrics import error_rates
from asr.common.provenance import command_line, portable_path
from asr.corpus.lexicon import read_lexicon
from asr.corpus.manifest import read_manifest, write_manifest
from asr.importing.phonemes import PhonemeRecogniser
from asr.measure.machine import provenance
from asr.runtime.audio import read_audio
from asr.runtime.beam import BeamConfig
from asr.runtime.cli import Parser, describe, guarded
from asr.runtime.files import check_writable, write_json


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--teacher", required=True, help="asr_waveform.hama of the wheel hama 1.7.0")
    add("--lexicon", required=True, help="of scripts/pronounce.py")
    add("--lm", required=True, help="word n-gram model, .lm or .arpa")
    add("--lm_weight", type=float, default=0.5, help="of its log probabilities (%(default)s)")
    add("--data_dir", help="manifest of recordings to write texts for")
    add("--test_data", help="manifest with texts: prints the error rate")
    add("--limit", type=int, default=0, help="of --test_data: so many, spread evenly; 0: all")
    add("--report_path", help="JSON to write: that error rate")
    add("--output_path", help="manifest to write")
    args = parser.parse_args(argv)
    if bool(args.data_dir) != bool(args.output_path) or not (args.data_dir or args.test_data):
        parser.error("give --data_dir and --output_path, or --test_data")
    if args.report_path and not args.test_data:
        parser.error("--report_path goes with --test_data")
    args.command = command_line("scripts/label_by_phonemes.py", argv)
    return args


def test(recogniser: PhonemeRecogniser, args: argparse.Namespace) -> None:
    """Prints the error rate on recordings with texts."""
    utterances = read_manifest(args.test_data)
    if args.limit:
        utterances = utterances[:: max(1, len(utterances) // args.limit)][: args.limit]
    heard = [recogniser(read_audio(u.audio_filepath)) for u in tqdm(utterances, disable=None)]
    rates = error_rates([u.text for u in utterances], heard)
    if args.report_path:
        about = {"test_data": portable_path(args.test_data), "recordings": len(heard)}
        write_json(args.report_path, provenance(args.command) | about | rates)
    rate = f"WER {rates['wer']:.1%}, CER {rates['cer']:.1%}"
    print(f"{args.test_data}: {len(heard)} recordings, {rate}")


def label(recogniser: PhonemeRecogniser, args: argparse.Namespace) -> None:
    """Writes the texts, line by line to a file that a run goes on with, at last the manifest."""
    output = Path(args.output_path)
    check_writable(output)
    utterances = read_manifest(args.data_dir)
    part = output.with_suffix(".part")
    texts: dict[str, str] = {}
    if part.exists():
        for line in part.read_text(encoding="utf-8").splitlines():
            path, text = json.loads(line)
            texts[path] = text
    with open(part, "a", encoding="utf-8", buffering=1) as file:
        for utterance in tqdm(utterances, unit="utt", disable=None):
            path = utterance.audio_filepath
            if path in texts:
                continue
            try:
                texts[path] = recogniser(read_audio(path))
            except (OSError, ValueError) as error:
                print(f"left out: {describe(error)}", file=sys.stderr)
                continue
            file.write(json.dumps([path, texts[path]]) + "\n")
    spoken = [u for u in utterances if texts.get(u.audio_filepath)]
    if not spoken:
        raise ValueError(f"{args.data_dir}: nothing was understood in any recording")
    write_manifest(output, [replace(u, text=texts[u.audio_filepath]) for u in spoken])
    part.unlink()
    print(f"{output}: {len(spoken)} of {len(utterances)} recordings")


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    config = BeamConfig(lm=args.lm, lm_weight=args.lm_weight)
    recogniser = PhonemeRecogniser(args.teacher, read_lexicon(args.lexicon), config)
    if args.test_data:
        test(recogniser, args)
    if args.data_dir:
        label(recogniser, args)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
