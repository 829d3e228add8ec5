"""Which transformers is under test: the pinned one, or the one that `make test-transformers-4` asked for."""

import os
import subprocess
import sys
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parents[3]
PINS = ROOT / os.environ.get("TRANSFORMERS_PINS", "constraints.txt")


def test_it_is_the_one_asked_for(tmp_path: Path) -> None:
    """Here, and in processes that tests start elsewhere. Catches: a second run of the tests on the first
    one's transformers, because the folder of the other is empty, comes second, or has a relative path."""
    (wanted,) = [line.strip() for line in PINS.read_text().splitlines() if line.startswith("transformers==")]
    ask = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    there = subprocess.run(ask, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    assert {f"transformers=={transformers.__version__}", f"transformers=={there}"} == {wanted}
