"""Turns audio into text: python transcribe.py --audio_path sample.wav --model_path model.onnx"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from asr.runtime.transcribe import main

if __name__ == "__main__":
    sys.exit(main())
