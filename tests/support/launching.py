"""Run the launch scripts with stand-ins for SLURM's commands and for python (tests/fake_slurm)."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.tools import ROOT

FAKES = ROOT / "tests" / "fake_slurm"
SBATCH, TORCHRUN = ROOT / "launch" / "retrofit.sbatch", ROOT / "launch" / "torchrun.sh"
NEEDED = {"NODES": "1", "GPUS_PER_NODE": "2"}


def write_env(folder: Path, *lines: str, **settings: str) -> Path:
    """Write an env file with the required variables, `settings`, then `lines`. TRAIN_ARGS saves in
    folder/run."""
    training = {"TRAIN_ARGS": f"--save {folder}/run --load {folder}/run --train-iters 100"}
    path = folder / "my.env"
    path.write_text("".join(f"{line}\n" for line in (*_pairs(training | NEEDED | settings), *lines)))
    return path


def _pairs(settings: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Return the environment for a launch, without the variables of a SLURM job that this test may run in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    path = f"{FAKES}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    ours = {"PATH": path, "FAKE_SLURM_LOG": str(folder / "slurm.log")}
    return kept | ours | {"FAKE_SAVE": str(folder / "run"), "FAKE_ADDS": "0"} | more


def launch(folder: Path, *words: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a launch script in `folder` to its end."""
    command = ["bash", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment(folder, **more), timeout=60
    )


def called(folder: Path) -> list[str]:
    """Return the calls of SLURM's commands."""
    log = folder / "slurm.log"
    return log.read_text().splitlines() if log.exists() else []
