"""The GPU tests share their cases with the CPU tests of tests/unit."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "unit"))
