"""Trains a Conformer-CTC recogniser: see `python train.py --help`."""

import sys

from asr.training.train import main

if __name__ == "__main__":
    sys.exit(main())
