"""The watchdog without Megatron: which rank is blamed, and ranks that hang, freeze, fail or lose their
store."""

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_dms.resilience.hang_diagnosis import Report, diagnose, waits_for_others
from megatron_dms.resilience.watchdog import EXIT, SAVE, START, STEP, Watchdog

pytestmark = pytest.mark.slow

TIMEOUT = 60  # seconds


def report(rank: int, step: int = 5, microbatches: int = 2, waits: bool = True) -> Report:
    return Report(rank, "node", 100 + rank, STEP, step, microbatches, 31.0, waits, "f.py:3 g")


def test_who_is_blamed() -> None:
    """Catches: the waiting ranks blamed, a rank that does not answer forgotten, progress not looked at."""
    waiting = [report(0), report(1)]
    hanging = diagnose([*waiting, report(2, waits=False)], {})
    assert hanging.startswith(
        "rank 2 (node, pid 102) is slow or hangs: step 5, training step, microbatch 2, 31 s"
    )
    behind = diagnose([report(0), report(1, microbatches=1), report(2, step=6)], {})
    assert behind.startswith("rank 1 ") and ";" not in behind
    dead = diagnose([report(0), report(1, waits=False)], {2: report(2), 3: None})
    assert dead == (
        "rank 2 (node, pid 102) is lost: it does not answer, its last heartbeat came from step 5, "
        "training step; "
        "rank 3 is lost: it does not answer and never sent a heartbeat"
    )
    assert "no rank stands out" in diagnose(waiting, {})


def test_a_report_survives_the_store() -> None:
    assert Report.from_json(report(3).to_json().encode()) == report(3)


class _Work:
    """Its wait is a C function, as that of torch's Work."""

    def __init__(self, lock: threading.Lock) -> None:
        self.wait = lock.acquire


@pytest.mark.parametrize(("waits", "line"), [(True, "work.wait()"), (False, "time.sleep(1)")])
def test_waiting_is_told_from_working(waits: bool, line: str) -> None:
    """The innermost line tells which. Catches: everybody waits, or nobody does."""
    lock = threading.Lock()
    lock.acquire()
    scope = {"work": _Work(lock), "time": time}
    code = compile(f"def run():\n    work, now = globals()['work'], time\n    {line}\n", "some.py", "exec")
    exec(code, scope)
    thread = threading.Thread(target=scope["run"], daemon=True)
    thread.start()
    time.sleep(0.3)
    frame = sys._current_frames()[thread.ident]
    assert frame.f_code.co_name == "run" and waits_for_others(frame) is waits
    lock.release()
    thread.join()


class Pair:
    """Two ranks, forked, and the store that torchrun's agent would host.

    Args:
        body: what a rank does; it calls `ready()` to go on when both are there.
    """

    def __init__(
        self,
        folder: Path,
        body: Callable[[Watchdog, Callable], None],
        step_limit: float = 60,
        silence: float = 60,
    ) -> None:
        self.store: dist.TCPStore | None = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        self.folder = folder
        limits = {START: 60.0, STEP: step_limit, SAVE: 60.0}
        self.pids = [self._fork(rank, self.store.port, body, limits, silence) for rank in range(2)]

    def _fork(self, rank: int, port: int, body: Callable, limits: dict[str, float], silence: float) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pytest's process has threads
            pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            os.dup2(os.open(self.folder / f"stderr{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            with Watchdog(limits, silence, self.folder / "watchdog", interval=0.2) as watchdog:
                body(watchdog, lambda: self._meet(rank))
            status = 0
        finally:
            os._exit(status)

    def _meet(self, rank: int) -> None:
        (self.folder / f"ready{rank}").touch()
        while not (self.folder / f"ready{1 - rank}").exists():
            time.sleep(0.02)

    def wait_until_ready(self) -> None:
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end and len(list(self.folder.glob("ready*"))) < 2:
            time.sleep(0.02)
        time.sleep(0.6)  # a few heartbeats

    def status(self, rank: int) -> int:
        """Wait for a rank's end."""
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(self.pids[rank], signal.SIGKILL)
        os.waitpid(self.pids[rank], 0)
        raise AssertionError(f"rank {rank} does not end: {self.said()}")

    def said(self) -> str:
        return "".join((self.folder / f"stderr{rank}").read_text() for rank in range(2))


def sleeps(watchdog: Watchdog, ready: Callable) -> None:
    watchdog.beat(STEP, 9)
    ready()
    time.sleep(1000)


def test_a_hanging_rank_is_named_and_ends_the_run(tmp_path: Path) -> None:
    """Rank 1 sleeps, rank 0 waits for it. Catches: a limit that is not minded, the wrong rank, stacks of one
    rank only, a run that goes on."""

    def hangs(watchdog: Watchdog, ready: Callable) -> None:
        ready()
        watchdog.beat(STEP, 7)
        if watchdog.rank == 1:
            time.sleep(1000)
        lock = threading.Lock()
        lock.acquire()
        _Work(lock).wait()

    pair = Pair(tmp_path, hangs, step_limit=1.5)
    statuses = [pair.status(0), pair.status(1)]
    said = pair.said()
    assert statuses == [EXIT, EXIT], said
    assert said.count("pretrain_dms.py: watchdog: ") == 1
    assert ": rank 1 (" in said and "is slow or hangs: step 7, training step, microbatch 1" in said
    for rank in range(2):
        stacks = (tmp_path / "watchdog" / f"rank-0000{rank}-stacks.txt").read_text()
        assert stacks in said and f"rank {rank} (" in stacks and " in hangs\n" in stacks


def test_a_frozen_rank_is_named(tmp_path: Path) -> None:
    """The rank's process is stopped, as on a machine that died. Catches: a silence that nobody notices."""
    pair = Pair(tmp_path, sleeps, silence=2)
    pair.wait_until_ready()
    os.kill(pair.pids[1], signal.SIGSTOP)
    status = pair.status(0)
    os.kill(pair.pids[1], signal.SIGKILL)
    pair.status(1)
    said = pair.said()
    assert status == EXIT and "rank 1 sent no heartbeat for " in said, said
    assert f"rank 1 ({os.uname().nodename}, pid {pair.pids[1]}) is lost: it does not answer" in said


def test_ranks_without_a_store_end(tmp_path: Path) -> None:
    """Node 0 is gone. Catches: a watchdog that dies with its store."""
    pair = Pair(tmp_path, sleeps, silence=1.5)
    pair.wait_until_ready()
    pair.store = None
    statuses = [pair.status(0), pair.status(1)]
    assert statuses == [EXIT, EXIT] and pair.said().count("node 0 is lost") == 2, pair.said()


def test_an_exception_is_said_with_rank_step_and_phase(tmp_path: Path) -> None:
    """A rank fails while saving; torchrun then ends the other rank. Catches: a phase that is left before
    its error is named, a cause of many lines, a rank that survives SIGTERM."""

    def fails(watchdog: Watchdog, ready: Callable) -> None:
        ready()
        watchdog.beat(STEP, 4)
        if watchdog.rank == 0:
            with watchdog.phase(SAVE):
                raise OSError("Caught OSError in worker.\nTraceback:\nOSError: no space")
        time.sleep(1000)

    pair = Pair(tmp_path, fails)
    statuses = [pair.status(0)]
    os.kill(pair.pids[1], signal.SIGTERM)
    statuses.append(pair.status(1))
    assert statuses == [1, 128 + signal.SIGTERM], pair.said()
    (line,) = [line for line in pair.said().splitlines() if line.startswith("pretrain_dms.py: ")]
    assert "error: rank 0 (" in line and line.endswith("step 4, save: OSError: no space")


@pytest.mark.parametrize(("status", "told"), [(1, True), (0, False)])
def test_an_exit_that_was_explained_ends_the_others(tmp_path: Path, status: int, told: bool) -> None:
    """A save that fails ends like this. Catches: ranks of other machines that are not told, or told of a
    good end."""

    def exits(watchdog: Watchdog, ready: Callable) -> None:
        ready()
        watchdog.beat(STEP, 4)
        if watchdog.rank == 0:
            raise SystemExit(status)
        time.sleep(1000)

    pair = Pair(tmp_path, exits)
    pair.status(0)
    assert dist.PrefixStore("megatron_dms/watchdog/0", pair.store).check(["alarm"]) is told
    os.kill(pair.pids[1], signal.SIGTERM)
    pair.status(1)
    assert "error: " not in pair.said()


def test_after_sigterm_the_dead_rank_is_named(tmp_path: Path) -> None:
    """torchrun ends the other ranks when one was killed. Catches: survivors that go without a word."""
    pair = Pair(tmp_path, sleeps)
    pair.wait_until_ready()
    os.kill(pair.pids[1], signal.SIGKILL)
    pair.status(1)
    os.kill(pair.pids[0], signal.SIGTERM)
    assert pair.status(0) == 128 + signal.SIGTERM
    lost = f"pid {pair.pids[1]}) is lost: it does not answer, its last heartbeat came from step 9"
    assert lost in pair.said()


def test_a_child_dies_of_sigterm_and_a_run_ends_well(tmp_path: Path) -> None:
    """Data loader workers are forked. Catches: a worker that cannot be ended, or whose signal ends the
    run; and a neighbour's normal end taken for its death."""

    def forks(watchdog: Watchdog, ready: Callable) -> None:
        ready()
        time.sleep(0.5)  # a heartbeat
        if watchdog.rank == 0:
            child = os.fork()
            if not child:
                time.sleep(20)
                os._exit(0)
            time.sleep(0.3)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
            time.sleep(4.5)

    pair = Pair(tmp_path, forks, silence=1)
    assert [pair.status(0), pair.status(1)] == [0, 0], pair.said()
    assert "watchdog: " not in pair.said()


def test_a_rank_that_ended_is_not_lost(tmp_path: Path) -> None:
    """Rank 1 is done when rank 0 fails. Catches: its missing answer taken for its death, or waited for."""

    def fails_late(watchdog: Watchdog, ready: Callable) -> None:
        ready()
        time.sleep(0.5 + (1 - watchdog.rank))
        if watchdog.rank == 0:
            raise ValueError("too late")

    pair = Pair(tmp_path, fails_late)
    assert [pair.status(0), pair.status(1)] == [1, 0], pair.said()
    said = pair.said()
    assert "ValueError: too late" in said and "lost" not in said and "watchdog: " not in said
