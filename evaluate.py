"""Measures a model: python evaluate.py --model_path M --test_data D --output_file result.json"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from asr.measure.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
