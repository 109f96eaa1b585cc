"""Trains a Conformer-CTC recogniser: see `python train.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from asr.training.train import main

if __name__ == "__main__":
    sys.exit(main())
