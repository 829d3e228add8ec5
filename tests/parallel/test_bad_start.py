"""What a user sees under torchrun when a run cannot start."""

import subprocess
from pathlib import Path

from tests.support.retrofit import ROOT, Workspace, environment

TIMEOUT = 120  # seconds
DELAY = """
import os, time
if os.environ.get("RANK") == "0":
    time.sleep(4)
"""


def test_the_line_is_said_though_other_ranks_fail_first(workspace: Workspace, tmp_path: Path) -> None:
    """Rank 0 is slow to start. Catches ranks that exit at once without a word: torchrun then ends rank 0,
    which was about to say what is wrong."""
    (tmp_path / "sitecustomize.py").write_text(DELAY)
    settings = environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = workspace.command(2, "--dms-windw", "3")
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "pretrain_dms.py: error:" in line]
    assert lines == ["pretrain_dms.py: error: unknown flag --dms-windw; did you mean --dms-window?"]
