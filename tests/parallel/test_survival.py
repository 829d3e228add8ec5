"""Runs that are killed, meet a full disk or find a damaged checkpoint end where they should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dms.formats.megatron_folder import TRACKER
from megatron_dms.resilience.resume_check import compare
from megatron_dms.resilience.run_folder import finished_iterations
from tests.parallel.test_layouts import PP, TP
from tests.support.retrofit import ROOT, STEPS, TIMEOUT, Workspace, environment

SAVING = ("--save-interval", "2")

# A disk that has no more room for one file: the error comes when the file is flushed, as on network disks.
FULL = """
import errno, os
flush = os.fsync
def fsync(file):
    path = os.readlink(f"/proc/self/fd/{file}")
    if os.environ["FULL"] in path and "unfinished-" in path:
        raise OSError(errno.ENOSPC, "No space left on device")
    flush(file)
os.fsync = fsync
"""


@pytest.fixture(scope="module")
def whole(workspace: Workspace) -> Path:
    """Run at TP 2 without an interruption -> the run's folder."""
    save = workspace.folder / "survival_whole"
    workspace.run("survival_whole", 2, *TP, *SAVING, "--save", str(save))
    return save


@pytest.fixture(scope="module")
def survivor(workspace: Workspace) -> Path:
    """Return the folder of the run that the tests below damage and resume, in their order."""
    return workspace.folder / "survivor"


def start(workspace: Workspace, save: Path, *flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Start the run and wait for its end; all that it printed is in stdout."""
    command = workspace.command(2, *TP, *SAVING, "--save", str(save), "--load", str(save), *flags)
    (workspace.folder / "sitecustomize.py").write_text(FULL)
    path = f"{workspace.folder}:{ROOT}" if settings else str(ROOT)
    return subprocess.run(
        command,
        env=environment() | settings | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(
    workspace: Workspace, survivor: Path
) -> None:
    """Catches: a cause that is lost on its way out of Megatron's writer, ranks that wait for ever for the one
    that failed, a pointer to a checkpoint that is not whole."""
    done = start(workspace, survivor, FULL="iter_0000004/__1_0.distcp")
    assert done.returncode != 0
    (line,) = (line for line in done.stdout.splitlines() if "pretrain_dms.py: error:" in line)
    assert (
        f"iteration 4 was not saved in {survivor}, the checkpoints before it are as they were: rank 1: "
        in line
    )
    assert line.endswith("iter_0000004/__1_0.distcp could not be written: [Errno 28] No space left on device")
    assert (survivor / TRACKER).read_text() == "2" and finished_iterations(survivor) == [2]


def test_asynchronous_saving_heals_it(workspace: Workspace, survivor: Path) -> None:
    """The disk has room again, and the same command goes on. Catches: --async-save that Megatron drops in
    silence, an unfinished folder taken for a checkpoint or left for ever, a pointer moved before all files
    are verified."""
    done = start(workspace, survivor, "--async-save", "--exit-interval", "4")
    assert done.returncode == 0, done.stdout[-4000:]
    assert "resuming from iteration 2 of" in done.stdout
    assert "scheduled an async checkpoint save at iteration       4" in done.stdout
    assert "iteration 4 verified" in done.stdout
    assert (survivor / TRACKER).read_text() == "4" and sorted(finished_iterations(survivor)) == [2, 4]
    assert not list(survivor.glob("unfinished-*"))


def test_a_flipped_bit_is_named_and_the_checkpoint_before_is_used(
    workspace: Workspace, survivor: Path, whole: Path
) -> None:
    """The final checkpoint equals that of an uninterrupted run bit for bit, although the saves were
    asynchronous. Catches: damage that is loaded, a set-aside checkpoint that is lost or in the way, a
    snapshot that training goes on writing to, old checkpoints removed unasked, or kept although they should
    go."""
    path = survivor / "iter_0000004" / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = start(workspace, survivor, "--async-save", "--dms-keep-checkpoints", "1")
    assert done.returncode == 0, done.stdout[-4000:]
    (line,) = (line for line in done.stdout.splitlines() if "damaged checkpoint:" in line)
    assert "iter_0000004/__1_0.distcp has" in line and "sha256" in line
    assert line.endswith("set aside as damaged_iter_0000004; using iteration 2 instead")
    assert "resuming from iteration 2 of" in done.stdout
    assert (survivor / TRACKER).read_text() == str(STEPS) and finished_iterations(survivor) == [STEPS]
    assert (survivor / "damaged_iter_0000004" / "__1_0.distcp").read_bytes() == bytes(content)
    tensors, different = compare(*(run / f"iter_{STEPS:07d}" for run in (whole, survivor)))
    assert tensors > 20 and different == []


def test_killed_again_and_again_it_ends_where_it_should(workspace: Workspace, tmp_path: Path) -> None:
    """tools/verify_resume.py kills a run at TP 2 x PP 2 up to 3 times, mostly in the middle of a save."""
    command = workspace.command(4, *TP, *PP)
    tool = [sys.executable, str(ROOT / "tools" / "verify_resume.py"), "--out", str(tmp_path / "soak")]
    tool += ["--steps", "8", "--save-interval", "1", "--kills", "3", "--while-saving", "0.7", "--seed", "1"]
    done = subprocess.run(
        [*tool, "--timeout", str(TIMEOUT), "--", *command],
        env=os.environ | environment(),
        capture_output=True,
        text=True,
        timeout=6 * TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["equal"] and found["tensors"] > 20
    assert found["kills"] >= 2  # the run may be through before a kill at a random moment
    assert found["landed"] >= 1 and found["lost"] == found["leftovers"] == 0
