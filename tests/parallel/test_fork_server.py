"""The fork server: its processes are what torchrun and python would start, and none of them is left."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.comparison import assert_same_curves
from tests.support.fork_cases import LONG, SOON, fail, gone, hang, leave_a_process, note, noted
from tests.support.forking import ROOT, ForkServer, one_thread
from tests.support.retrofit import STEPS, Workspace, free_port

DESCRIBE = """
import json, os, sys
found = {
    "environment": dict(os.environ),
    "words": sys.argv[1:],
    "first path": sys.path[0],
    "leads a session": os.getsid(0) == os.getpid(),
    "main": sys.modules["__main__"].__file__,
}
print(json.dumps(found))
"""
SPAWN = """
import multiprocessing

def answer(queue):
    queue.put(f"{__name__} has {queue.get()}")

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    queue.put("a number")
    process = context.Process(target=answer, args=(queue,))
    process.start()
    process.join()
    print(queue.get())
"""
HANG_UNDER_A_CLIENT = """
import sys
from pathlib import Path
from tests.support import fork_cases
from tests.support.forking import ForkServer
with ForkServer(modules=()) as server:
    server.spawn(fork_cases.hang, (Path(sys.argv[1]),), 2)
"""


@pytest.fixture(scope="module")
def bare() -> Iterator[ForkServer]:
    """A server that has imported nothing, and starts at once."""
    with ForkServer(modules=()) as server:
        yield server


def say_random_numbers() -> None:
    """Print a number of each generator that a run may draw from."""
    print(random.random(), np.random.rand(), torch.rand(1).item(), torch.initial_seed())


def test_a_rank_finds_what_torchrun_sets(fork_server: ForkServer, tmp_path: Path) -> None:
    """Catches: a variable that torchrun's ranks have and forked ones lack, or the other way round, another
    `__main__`, words or import path."""
    script = tmp_path / "describe.py"
    script.write_text(DESCRIBE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, "--master-port", str(free_port()), str(script), "--a", "b c"]
    real = subprocess.run(command, env=one_thread(), capture_output=True, text=True, timeout=120)
    forked = fork_server.torchrun(script, ["--a", "b c"], 2)
    assert (real.returncode, forked.returncode) == (0, 0), real.stderr + forked.stderr
    descriptions = [[json.loads(line) for line in done.stdout.splitlines()] for done in (real, forked)]
    for expected, found in zip(*(sorted(ranks, key=rank_of) for ranks in descriptions), strict=True):
        ours, theirs = found.pop("environment"), expected.pop("environment")
        assert found == expected
        for name in ("MASTER_PORT", "TORCHELASTIC_ERROR_FILE"):
            assert ours.pop(name) and theirs.pop(name)
        assert theirs.items() <= ours.items()
        assert ours.keys() - theirs.keys() <= SET_BY_IMPORTS


SET_BY_IMPORTS = {"TORCHDYNAMO_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS", "TORCHINDUCTOR_CACHE_DIR"}


def rank_of(description: dict) -> str:
    """The rank in a description."""
    return description["environment"]["RANK"]


def test_processes_draw_their_own_random_numbers(fork_server: ForkServer) -> None:
    """Catches generators that all children inherit in one state, where fresh interpreters differ."""
    first, second = (fork_server.call(say_random_numbers).stdout.split() for _ in range(2))
    assert len(first) == 4 and not set(first) & set(second)


def test_a_forked_rank_saves_asynchronously(
    workspace: Workspace, reference: dict[str, list[float]], tmp_path: Path
) -> None:
    """Megatron's writer is a process that imports the main script anew. Catches a `__main__` that cannot be
    imported, and queues or locks that the server's children share."""
    save = ("--save", str(tmp_path / "run"), "--save-interval", str(STEPS // 2), "--async-save")
    curves = workspace.run("async_save", 1, *save)
    assert_same_curves(curves, reference, range(STEPS), 0.0)
    log = (workspace.folder / "async_save.log").read_text()
    assert all(f"iteration {step} verified" in log for step in (STEPS // 2, STEPS))


def test_a_forked_script_spawns_processes(bare: ForkServer, tmp_path: Path) -> None:
    """Catches: a spawned process that imports the server in place of the script, or runs the script again."""
    script = tmp_path / "spawn.py"
    script.write_text(SPAWN)
    done = bare.run(script)
    assert (done.returncode, done.stdout) == (0, "__mp_main__ has a number\n"), done.stderr


def test_a_rank_that_fails_ends_the_others(bare: ForkServer, tmp_path: Path) -> None:
    """Catches: ranks that go on waiting, and an exit code or a message of one that was ended."""
    begin = time.monotonic()
    done = bare.spawn(fail, (tmp_path,), 3)
    assert done.returncode == 1 and time.monotonic() - begin < SOON
    assert done.stderr.splitlines()[-1] == "RuntimeError: rank 1 has met an error"
    assert gone(noted(tmp_path, 3) - {bare.pid})


def test_a_failed_run_shows_its_log(workspace: Workspace) -> None:
    """Catches a rank's last words lost, and an exit code taken for success."""
    with pytest.raises(RuntimeError, match=r"exit code [12]\n(?s:.*)unknown flag --dms-windw"):
        workspace.run("fails", 1, "--dms-windw", "3")


def test_a_hang_is_ended_at_the_timeout(bare: ForkServer, tmp_path: Path) -> None:
    """Catches: ranks that outlive their test, and words that are lost with them."""
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        bare.spawn(hang, (tmp_path,), 2, timeout=1)
    assert "rank 0 sleeps" in caught.value.__notes__[0] and "rank 1 sleeps" in caught.value.__notes__[0]
    assert gone(noted(tmp_path, 2) - {bare.pid})
    assert bare.call(note, tmp_path).returncode == 0  # the server goes on


def test_what_a_rank_leaves_behind_is_ended(bare: ForkServer, tmp_path: Path) -> None:
    """Catches a process that outlives its test because it has left its rank's session."""
    assert bare.call(leave_a_process, tmp_path).returncode == 0
    assert gone({int((tmp_path / "left").read_text())})
    assert bare.leftovers == [f"sleep {LONG}"]


@pytest.mark.parametrize("victim", ["client", "server"])
def test_nothing_outlives_the_server_or_its_client(victim: str, tmp_path: Path) -> None:
    """Killed with signal 9 in the middle of a job. Catches a server or ranks that stay for ever."""
    command = [sys.executable, "-c", HANG_UNDER_A_CLIENT, str(tmp_path)]
    with subprocess.Popen(command, env=one_thread(), cwd=ROOT, stderr=subprocess.PIPE, text=True) as client:
        pids = noted(tmp_path, 2)
        (server,) = pids - {int(file.stem) for file in tmp_path.glob("*.pid")}
        os.kill(client.pid if victim == "client" else server, signal.SIGKILL)
        _, said = client.communicate(timeout=SOON)
    assert client.returncode != 0
    assert victim == "client" or "the fork server has ended" in said
    assert gone(pids)
