"""One job of the chain: signal, save, requeue or stop. SLURM and training are stand-ins
(tests/fake_slurm)."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.launching import FAKES, ROOT, SBATCH, TORCHRUN, called, environment, launch, write_env

TRACKER, COUNT = "latest_checkpointed_iteration.txt", "jobs_without_progress"
PATIENCE = 30  # seconds until a stand-in is ready
JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "a"}


def job_env(folder: Path, **settings: str) -> Path:
    """Write an env file whose python is the stand-in."""
    (folder / "venv" / "bin").mkdir(parents=True, exist_ok=True)
    python = folder / "venv" / "bin" / "python"
    python.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} {FAKES}/python "$@"\n')
    python.chmod(0o755)
    (folder / "run").mkdir(exist_ok=True)
    return write_env(folder, **{"VENV": str(folder / "venv")} | settings)


def signalled(folder: Path, what: int, *words: str | Path, **more: str) -> tuple[int, str]:
    """Run a script and send it a signal when its worker listens; return the status and stderr.

    With FAKE_DEAF_SECONDS the signal comes before the worker listens, and goes to all processes, as some
    SLURMs do.
    """
    ready = folder / "run" / "ready"
    ready.unlink(missing_ok=True)
    process = subprocess.Popen(
        ["bash", *map(str, words)], cwd=folder, env=environment(folder, **more), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + PATIENCE
    early = float(more.get("FAKE_DEAF_SECONDS", "0"))
    while not ready.exists() and process.poll() is None and time.monotonic() < end and not early:
        time.sleep(0.05)
    time.sleep(early / 2)
    if early:
        os.killpg(process.pid, what)
    else:
        process.send_signal(what)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def job(folder: Path, what: int = signal.SIGUSR1, **more: str) -> int:
    """Run one job that is told to stop."""
    env = job_env(folder)
    return signalled(folder, what, SBATCH, "--in-job", ROOT, env, **JOB | more)[0]


def requeued(folder: Path) -> int:
    """Count the requests to requeue."""
    return sum(call == "scontrol requeue 77" for call in called(folder))


@pytest.mark.parametrize("what", [signal.SIGUSR1, signal.SIGTERM])
def test_progress_is_requeued(tmp_path: Path, what: int) -> None:
    """Catches: a signal that misses the worker, reaches it twice, or ends torchrun or a deaf child."""
    assert job(tmp_path, what, FAKE_ADDS="5") == 0
    assert (tmp_path / "run" / TRACKER).read_text() == "5" and requeued(tmp_path) == 1
    assert (tmp_path / "run" / "signals").read_text() == "worker\n"
    assert (tmp_path / "run" / COUNT).read_text() == "0\n"


def test_a_chain_without_progress_stops(tmp_path: Path) -> None:
    """Two jobs in a row without progress stop the chain; two in all do not. Catches: a count that is not
    kept, or not reset by progress."""
    for adds, status, requeues in (("0", 0, 1), ("3", 0, 2), ("0", 0, 3), ("0", 4, 3)):
        assert job(tmp_path, FAKE_ADDS=adds) == status
        assert requeued(tmp_path) == requeues


def test_a_finished_run_is_not_requeued(tmp_path: Path) -> None:
    """The signal came in its last steps (--train-iters is 100). Catches: a job that would train nothing."""
    assert job(tmp_path, FAKE_ADDS="100") == 0 and requeued(tmp_path) == 0


def test_a_cancelled_job_is_not_requeued(tmp_path: Path) -> None:
    """scancel sends TERM, and so may the end of the time. Catches: a job that nobody can end."""
    assert job(tmp_path, signal.SIGTERM, FAKE_ADDS="5", FAKE_STATE="CANCELLED") == 0
    assert requeued(tmp_path) == 0


def test_a_requeue_that_fails_is_said(tmp_path: Path) -> None:
    assert job(tmp_path, FAKE_ADDS="5", FAKE_REQUEUE_STATUS="1") == 5


@pytest.mark.parametrize(
    ("more", "status"),
    [({"FAKE_STATUS": "0"}, 0), ({"FAKE_STATUS": "7"}, 7), ({"FAKE_PREFLIGHT_STATUS": "1"}, 3)],
)
def test_without_a_signal_nothing_is_requeued(tmp_path: Path, more: dict[str, str], status: int) -> None:
    """Catches: a crash that is requeued for ever, training behind a failed preflight, a lost exit status."""
    env = job_env(tmp_path)
    done = launch(tmp_path, SBATCH, "--in-job", ROOT, env, **JOB | {"FAKE_STATUS": "9"} | more)
    assert done.returncode == status, done.stderr
    assert requeued(tmp_path) == 0
    steps = [call.split("--only ")[1].split()[0] for call in called(tmp_path) if call.startswith("srun")]
    assert steps == (["preflight"] if status == 3 else ["preflight", "train"])


def test_a_signal_during_the_start_waits_for_the_worker(tmp_path: Path) -> None:
    """Runs torchrun.sh alone. Catches: a signal that is lost, or that kills torchrun or a worker without
    its handler."""
    env = job_env(tmp_path)
    more = {"FAKE_ADDS": "2", "FAKE_DEAF_SECONDS": "3"}
    status, errors = signalled(tmp_path, signal.SIGUSR1, TORCHRUN, "--only", "train", env, **more)
    assert status == 0, errors
    assert (tmp_path / "run" / TRACKER).read_text() == "2"


def test_all_nodes_meet_at_the_first(tmp_path: Path) -> None:
    """Starts two nodes. Catches: a rendezvous of each node's own, two hosts of it, and a number of nodes
    that is wrong."""
    env = job_env(tmp_path, NODES="2", PREFLIGHT="no")
    job_of_two = JOB | {"SLURM_JOB_NODELIST": "a,b", "FAKE_STATUS": "0"}
    assert launch(tmp_path, SBATCH, "--in-job", ROOT, env, **job_of_two).returncode == 0
    (step,) = [call for call in called(tmp_path) if call.startswith("srun")]
    assert step.startswith("srun --nodes=2 --ntasks=2 ") and " --hosts a,b " in step
    for rank, host in enumerate(("a", "b")):
        shown = launch(
            tmp_path, TORCHRUN, "--dry-run", "--hosts", "a,b", "--node-rank", str(rank), env
        ).stdout
        assert f"--rdzv-endpoint a:29400 --rdzv-id retrofit --rdzv-conf is_host={1 - rank}" in shown
        assert f"--local-addr {host} " in shown
    done = launch(tmp_path, SBATCH, "--in-job", ROOT, env, **JOB)
    assert done.returncode == 2 and "NODES is 2, but SLURM gave 1: a" in done.stderr
