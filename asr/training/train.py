"""Trains a Conformer-CTC speech recogniser on recordings and their texts.

From nothing, from a checkpoint (--init_from), or onward from where a run stopped (--resume):

    python train.py --data_dir data/LibriSpeech --output_dir runs/baseline

OUTPUT_DIR/model.pt is the model of the best dev word error rate, for compress.py and transcribe.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from asr.runtime.cli import Parser, add_flags, guarded, read_config_file
from asr.runtime.config import PRESETS
from asr.runtime.tokenizer import ENGLISH
from asr.training.run import train
from asr.training.start import DIMENSIONS
from asr.training.train_config import TrainConfig

PRESET_SIZES = (
    "tiny 2 M parameters, base 6 M, small 13 M, medium 30 M, large 72 M; with half the frames, "
    "hence for --tokenizer bpe, fast_small 13 M, fast_medium 26 M, fast_large 109 M"
)
RECIPES = Path("experiments", "recipes")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags that were given, here or in the file of --config, by their names; no others."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--data_dir", nargs="+",
        help="manifests or a LibriSpeech tree (see prepare_data.py); several count as one",
    )  # fmt: skip
    parser.add_argument("--output_dir", help="folder for model.pt, last.pt and log.jsonl")
    parser.add_argument(
        "--config", help="JSON or TOML file of flags, or the name of one in experiments/recipes/; "
        "the command line wins",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", default=None, help="go on from OUTPUT_DIR/last.pt"
    )
    parser.add_argument("--init_from", help="fine-tune this checkpoint: its model and tokens")
    parser.add_argument(
        "--new_tokens", action="store_true", default=None,
        help="with --init_from: take the tokens of the training texts, as the flags below say, and "
        "a new output layer; the encoder is kept (see --head_epochs)",
    )  # fmt: skip
    model = parser.add_argument_group("model", "A preset has a value for each of the others.")
    model.add_argument("--preset", choices=PRESETS, help=f"size: {PRESET_SIZES} (default: small)")
    for name, (kind, meaning) in DIMENSIONS.items():
        model.add_argument(f"--{name}", type=kind, help=meaning)
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument("--tokenizer", choices=("char", "bpe"), help="units (default: char)")
    tokens.add_argument("--vocab_size", type=int, help="pieces of the BPE (default: 128)")
    tokens.add_argument(
        "--alphabet", help="characters beside the space; 'auto' takes those of the training texts "
        f"(default: {ENGLISH})",
    )  # fmt: skip
    add_flags(parser.add_argument_group("training"), TrainConfig)
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    if "config" in given:
        path = find_recipe(given.pop("config"))
        known = {action.dest for action in parser._actions} - {"help", "version", "config"}
        given = read_recipe(path, known) | given
    for name in ("data_dir", "output_dir"):
        if not given.get(name):
            parser.error(f"--{name} is needed")
    return argparse.Namespace(**given)


def find_recipe(name: str) -> Path:
    """The file of that path, or the shipped recipe of that name; a ValueError lists those."""
    path = Path(name)
    if path.exists():
        return path
    folders = [root / RECIPES for root in (Path(__file__).resolve().parents[2], Path.cwd())]
    for folder in folders:
        if (folder / f"{name}.json").exists():
            return folder / f"{name}.json"
    names = sorted({p.stem for folder in folders for p in folder.glob("*.json")})
    raise ValueError(
        f"--config {name}: no such file, nor a recipe in {RECIPES} ({', '.join(names) or 'none'})"
    )


def read_recipe(path: Path, known: set[str]) -> dict[str, Any]:
    """The settings in a file; what is to be read is looked for in the file's own folder first."""
    settings = read_config_file(str(path))
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"{path}: unknown settings: {', '.join(unknown)}")

    def beside(place: Any) -> Any:
        if isinstance(place, list):
            return [beside(one) for one in place]
        return str(path.parent / place) if (path.parent / str(place)).exists() else place

    found = {name: beside(settings[name]) for name in ("init_from", "data_dir") if name in settings}
    return settings | found


def run(args: argparse.Namespace) -> int:
    return 0 if train(**vars(args)).finished else 130


def main(argv: list[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
