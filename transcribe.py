"""Turns audio into text: python transcribe.py --audio_path sample.wav --model_path model.onnx"""

import sys

from asr.runtime.transcribe import main

if __name__ == "__main__":
    sys.exit(main())
