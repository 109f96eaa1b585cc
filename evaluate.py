"""Measures a model: python evaluate.py --model_path M --test_data D --output_file result.json"""

import sys

from asr.measure.evaluation import main

if __name__ == "__main__":
    sys.exit(main())
