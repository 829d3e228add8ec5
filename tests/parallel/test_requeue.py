"""A job that SLURM warns of its time limit saves, is requeued, and goes on as if nothing had happened.

The launch scripts and the training are the real ones, on two "nodes" of this machine. SLURM's commands are
stand-ins (tests/fake_slurm).
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_dms.formats.megatron_folder import TRACKER, iteration_folder
from megatron_dms.resilience.resume_check import compare
from tests.support.comparison import assert_same_curves
from tests.support.retrofit import FLAGS, ROOT, TIMEOUT, Workspace, environment, free_port, read_curves

ITERATIONS = 30  # each takes about 0.1 seconds, so that there is time for a signal in between
SAVING = ("--save-interval", "1000", "--train-iters", str(ITERATIONS))
HOSTS = "localhost,127.0.0.1"


def write_env(workspace: Workspace, save: Path) -> Path:
    """Write the env file of a run that equals `workspace.run(name, 2, *SAVING)`."""
    base, board = workspace.base, workspace.folder / "boards" / save.name
    training = [*FLAGS, "--train-data-path", str(workspace.data), "--pretrained-checkpoint", str(base)]
    training += ["--dms-teacher", str(base), "--micro-batch-size", "2", "--global-batch-size", "4"]
    training += [*SAVING, "--save", str(save), "--load", str(save), "--tensorboard-dir", str(board)]
    settings = {
        "TRAIN_ARGS": " ".join(training),
        "NODES": "2",
        "GPUS_PER_NODE": "1",
        "DEVICE": "cpu",
        "PORT": str(free_port()),
        "PREFLIGHT": "no",
        "VENV": sys.prefix,
    }
    path = workspace.folder / f"{save.name}.env"
    path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    return path


def start_job(workspace: Workspace, env: Path, log: Path) -> subprocess.Popen:
    """Start the batch script as SLURM does."""
    fakes = ROOT / "tests" / "fake_slurm"
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": HOSTS, "FAKE_SLURM_LOG": f"{log}.slurm"}
    path = f"{fakes}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = ROOT / "launch" / "retrofit.sbatch"
    command = ["bash", str(script), "--in-job", str(ROOT), str(env)]
    with log.open("w") as out:
        settings = environment() | job | {"PATH": path}
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=settings, cwd=log.parent)


def end_of(job: subprocess.Popen, log: Path) -> str:
    """Wait for a job, which must end with status 0 -> what it printed."""
    status = job.wait(timeout=TIMEOUT)
    text = log.read_text()
    assert status == 0, text[-6000:]
    return text


def test_a_requeued_run_equals_an_uninterrupted_one_bit_for_bit(workspace: Workspace) -> None:
    """Curves, weights and optimizer state are compared on two nodes at DP 2. Catches a signal that does not
    reach the workers or ends them before they have saved, a job that is not requeued, and a resumption that
    is not the same run."""
    whole, parts = workspace.folder / "whole", workspace.folder / "parts"
    env, log = write_env(workspace, parts), workspace.folder / "job.log"
    curves = workspace.run("whole", 2, *SAVING, "--save", str(whole))

    job = start_job(workspace, env, log)
    end = time.monotonic() + TIMEOUT
    while not re.search(r"iteration +3/", log.read_text()) and time.monotonic() < end and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    said = end_of(job, log)
    saved = int((parts / TRACKER).read_text())
    assert 3 <= saved < ITERATIONS, f"saved at iteration {saved}"
    assert f"iteration 0 before this job, {saved} after it; status 0, after a signal" in said
    assert Path(f"{log}.slurm").read_text().splitlines()[-1] == "scontrol requeue 77"

    said = end_of(start_job(workspace, env, log), log)
    assert f"iteration {saved} before this job, {ITERATIONS} after it; status 0\n" in said
    resumed = read_curves(workspace.folder / "boards" / parts.name)
    assert_same_curves(resumed, curves, range(ITERATIONS), 0.0)
    tensors, different = compare(*(iteration_folder(run, ITERATIONS) for run in (whole, parts)))
    assert tensors > 20 and different == []
