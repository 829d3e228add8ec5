"""Which transformers is under test: the pinned one, or the one that `make test-transformers-4` asked for."""

import os
from pathlib import Path

import transformers

from tests.support.tools import ROOT, run_python

PINS = ROOT / os.environ.get("TRANSFORMERS_PINS", "constraints.txt")


def test_it_is_the_one_asked_for(tmp_path: Path) -> None:
    """Checks this process, and processes that tests start elsewhere. Catches: a second run of the tests on
    the first one's transformers, because the folder of the other is empty, comes second, or has a relative
    path."""
    (wanted,) = [line.strip() for line in PINS.read_text().splitlines() if line.startswith("transformers==")]
    done = run_python("-c", "import transformers; print(transformers.__version__)", cwd=tmp_path)
    assert done.status == 0, done.error
    there = done.out.strip()
    assert {f"transformers=={transformers.__version__}", f"transformers=={there}"} == {wanted}
