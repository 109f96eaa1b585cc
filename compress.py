"""Makes a trained checkpoint smaller: see `python compress.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from compress.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
