"""Processes that import triton under other settings: its interpreter, or a compiler whose cache is empty."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.support.tools import ROOT


def run(script: Path, *words: str, out: Path, **settings: str) -> Path:
    """Run `python script *words out` with these environment variables and no others of Triton's."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    keep |= {"TRITON_CACHE_DIR": str(out.parent / "triton"), "OMP_NUM_THREADS": "1"} | settings
    keep["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(script), *words, str(out)]
    done = subprocess.run(command, env=keep, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def hide_nothing() -> None:
    """Let torch.empty give NaN in this process, so that a read of unwritten memory shows."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
