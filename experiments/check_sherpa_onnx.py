"""Runs an exported model in sherpa-onnx, a runtime in C++, and compares its texts with ours.

    pip install sherpa-onnx sherpa-onnx-core
    python experiments/check_sherpa_onnx.py --model_path M.onnx --test_data DIR --output_path R.json

sherpa-onnx computes its own features, whose frames sit half a hop off ours; nothing else may
differ. So it reads every recording twice, the second time with half a hop (5 ms) of zeros in front:
then the frames are ours. The exit code is 1 if the corpus WERs differ by more than a point, or the
texts in more than 3 % of their characters (1 % with equal frames).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from asr.common.metrics import character_counts, error_rates
from asr.common.provenance import command_line, portable_path
from asr.corpus.manifest import Utterance
from asr.measure.evaluation import read_test_data
from asr.measure.machine import provenance
from asr.runtime.audio import Waveform, read_audio
from asr.runtime.cli import Parser, guarded
from asr.runtime.files import check_writable, write_json
from asr.runtime.recognizer import load

MAX_WER_DIFFERENCE, MAX_CHARACTERS, MAX_ALIGNED = 0.01, 0.03, 0.01


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_path", required=True, help="an .onnx export with its tokens.txt beside it")
    add("--test_data", required=True, help="manifest, LibriSpeech folder or folder of manifests")
    parser.add_output_path("JSON with the rates and every differing text")
    add("--no_texts", action="store_true", help="name differing utterances without their texts")
    add("--limit", type=int, default=0, help="only the first so many utterances (default: all)")
    args = parser.parse_args(argv)
    args.command = command_line("experiments/check_sherpa_onnx.py", argv)
    return args


class Sherpa:
    """sherpa-onnx's recogniser of NeMo CTC models."""

    def __init__(self, model_path: Path) -> None:
        import sherpa_onnx

        tokens = model_path.with_name("tokens.txt")
        for path in (model_path, tokens):
            if not path.exists():  # sherpa-onnx ends the process
                raise ValueError(f"{path}: no such file; scripts/export_onnx.py writes it")
        self._recognizer = sherpa_onnx.OfflineRecognizer.from_nemo_ctc(
            str(model_path), str(tokens), num_threads=1
        )

    def transcribe(self, waveform: Waveform, sample_rate: int = 16000) -> str:
        """The text of a waveform (N,) in [-1, 1]."""
        stream = self._recognizer.create_stream()
        stream.accept_waveform(sample_rate, waveform)
        self._recognizer.decode_stream(stream)
        return " ".join(stream.result.text.split())


def compare(model_path: str | Path, utterances: Sequence[Utterance]) -> dict[str, Any]:
    """Both runtimes' corpus WER on utterances, and in how many characters their texts differ."""
    ours, sherpa = load(model_path, threads=1, min_confidence=0), Sherpa(Path(model_path))
    half_hop = ours.info.features.hop_length // 2
    rows = []
    for utterance in tqdm(utterances, desc="comparing", unit="utt", leave=False, disable=None):
        waveform = read_audio(utterance.audio_filepath, ours.info.features.sample_rate)
        row = {"id": utterance.id, "reference": utterance.text}
        row["ours"] = ours.transcribe(waveform).text
        row["sherpa"] = sherpa.transcribe(waveform)
        row["aligned"] = sherpa.transcribe(np.pad(waveform, (half_hop, 0)))
        rows.append(row)
    references = [row["reference"] for row in rows]
    return {
        "wer": error_rates(references, [row["ours"] for row in rows])["wer"],
        "sherpa_wer": error_rates(references, [row["sherpa"] for row in rows])["wer"],
        "characters_differing": difference(rows, "sherpa"),
        "characters_differing_aligned": difference(rows, "aligned"),
        "identical": sum(row["ours"] == row["sherpa"] for row in rows) / len(rows),
        "differing": [row for row in rows if row["ours"] != row["sherpa"]],
    }


def difference(rows: Sequence[dict[str, str]], key: str) -> float:
    """Character edits from our texts to those under `key`, over the characters of ours."""
    counts = [character_counts(row["ours"], row[key]) for row in rows]
    return sum(sum(c[:3]) for c in counts) / max(sum(c[3] for c in counts), 1)


def run(args: argparse.Namespace) -> int:
    """Compares, prints, writes; 1 if the two differ too much."""
    utterances = read_test_data(args.test_data)[: args.limit or None]
    if args.output_path:
        check_writable(args.output_path)
    result = compare(args.model_path, utterances)
    print(f"{len(utterances)} utterances")
    print(f"WER here {result['wer']:.2%}, in sherpa-onnx {result['sherpa_wer']:.2%}")
    print(
        f"texts differ in {result['characters_differing']:.2%} of characters, "
        f"{result['characters_differing_aligned']:.2%} with equal frames; "
        f"{result['identical']:.1%} are identical"
    )
    if args.no_texts:
        result["differing"] = [row["id"] for row in result["differing"]]
    if args.output_path:
        about = {
            "model": portable_path(args.model_path),
            "test_data": portable_path(args.test_data),
            "utterances": len(utterances),
            "sherpa_onnx": version("sherpa-onnx"),
        }
        write_json(args.output_path, about | provenance(args.command) | result)
    apart = abs(result["wer"] - result["sherpa_wer"])
    return int(
        apart > MAX_WER_DIFFERENCE
        or result["characters_differing"] > MAX_CHARACTERS
        or result["characters_differing_aligned"] > MAX_ALIGNED
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
