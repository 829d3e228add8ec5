"""The GPU tests share their cases with the CPU tests of tests/unit, and their runs with tests/parallel."""

import sys
from pathlib import Path

for folder in ("unit", "parallel"):
    sys.path.append(str(Path(__file__).resolve().parents[1] / folder))
