"""Trains a Conformer-CTC recogniser: python train.py --data_dir ./data/LibriSpeech --output_dir …"""

import sys

from asr.train import main

if __name__ == "__main__":
    sys.exit(main())
