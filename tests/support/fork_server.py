"""A process that imports Megatron once and forks the processes of the tests.

    python -u -m tests.support.fork_server MODULE...

Importing Megatron takes each process 10 to 20 CPU seconds; a forked process has it from the start. A test
uses the server through tests/support/forking.py. The server reads one job a line (JSON) from its standard
input and answers one outcome a line; it ends when its standard input does, and ends what it has forked.

A forked process finds what a fresh interpreter would find: its own session, arguments, environment,
`__main__`, streams and random seeds, no other thread, no process group. Two things differ: all processes of
one server hash strings alike, and environment variables that a library reads while it is imported have the
values with which the server was started.
"""

import base64
import ctypes
import gc
import importlib
import json
import os
import pickle
import random
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import IO

from megatron_dms.processes import end_with_parent

# What pretrain_dms.py and the checkpoint tools import, most of it in their functions.
PRELOADED = (
    "megatron.training",
    "transformers",
    "megatron_dms.training.startup",
    "megatron_dms.training.build",
    "megatron_dms.training.step",
    "megatron_dms.resilience.verified_saves",
    "megatron_dms.conversion.parity.megatron_model",
)
# A thread of the allocator that comes with pyarrow would not survive a fork.
WITHOUT_THREADS = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
PATIENCE = 30.0  # seconds from SIGTERM to SIGKILL, as torchrun has it
LEFTOVERS_PATIENCE = 5.0  # seconds
_PR_SET_CHILD_SUBREAPER = 36  # of Linux' prctl


@dataclass(frozen=True)
class Job:
    """What to run in forked processes.

    script: its path; None for a call. words: the script's arguments. call: the base64 of a pickled (function,
    arguments). processes: how many; None means one, which is not numbered. torchrun: set the environment
    variables that torchrun sets, and host a store for the rendezvous. stderr: None for stdout's file;
    numbered processes have a file each, with ".RANK" at its end. timeout: seconds.
    """

    script: str | None
    words: list[str]
    call: str | None
    processes: int | None
    torchrun: bool
    environment: dict[str, str]
    folder: str
    stdout: str
    stderr: str | None
    timeout: float

    def stderr_of(self, rank: int) -> str:
        """Path of the file that takes the errors of a process."""
        if self.stderr is None:
            return self.stdout
        return self.stderr if self.processes is None else f"{self.stderr}.{rank}"


@dataclass
class Outcome:
    """How the processes of a job ended: exit codes by rank (-N: by signal N), and the first that failed."""

    codes: list[int | None]
    first_failed: int | None = None
    timed_out: bool = False
    leftovers: list[str] = field(default_factory=list)
    """Command lines of processes that outlived their rank and had to be killed."""


@dataclass(frozen=True)
class Child:
    """A forked process before it runs its part of the job."""

    job: Job
    rank: int
    port: int
    added: Mapping[str, str]
    """Environment variables that the imports have set."""

    def run(self) -> None:
        """Become the process that the job asks for, and do its work. SystemExit and errors pass through."""
        job = self.job
        self._redirect()
        os.environ.clear()
        os.environ.update(self.added | job.environment)
        if job.torchrun:
            os.environ.update(self._torchrun_variables())
        os.chdir(job.folder)
        _new_seeds()
        if job.script is not None:
            run_script(job.script, job.words)
        elif job.call is not None:
            function, arguments = pickle.loads(base64.b64decode(job.call))
            sys.argv = ["-c"]
            function(*arguments) if job.processes is None else function(self.rank, *arguments)

    def _redirect(self) -> None:
        for number, path in ((1, self.job.stdout), (2, self.job.stderr_of(self.rank))):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)

    def _torchrun_variables(self) -> dict[str, str]:
        """What torchrun's agent sets on a single node (torch 2.13 and 2.14)."""
        world = str(self.job.processes)
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.rank),
            "ROLE_RANK": str(self.rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
            "ROLE_WORLD_SIZE": world,
            "GROUP_WORLD_SIZE": "1",
            "ROLE_NAME": "default",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_RUN_ID": "none",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
            "TORCHELASTIC_ERROR_FILE": f"{self.job.stdout}.error-{self.rank}.json",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        }


def run_script(path: str, words: list[str]) -> None:
    """Execute the script as `python path words` would: it is `__main__`, also for what it spawns."""
    main = ModuleType("__main__")
    main.__file__ = path
    sys.modules["__main__"] = main
    sys.argv, sys.path[0] = [path, *words], str(Path(path).parent)
    exec(compile(Path(path).read_bytes(), path, "exec"), main.__dict__)


def _new_seeds() -> None:
    """Seed from the operating system, as an interpreter and its imports do."""
    random.seed()
    if "torch" in sys.modules:
        import numpy as np
        import torch

        np.random.seed()
        torch.default_generator.seed()


class Running:
    """The processes of one job, and the store through which they find each other."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._outcome = Outcome([None] * (job.processes or 1))
        self._ranks: dict[int, int] = {}  # by the file descriptor that tells the process's end
        self._pids: dict[int, int] = {}
        open(job.stdout, "w").close()

    def add(self, rank: int, pid: int) -> None:
        """A process that was just forked."""
        file = os.pidfd_open(pid)
        self._ranks[file], self._pids[file] = rank, pid

    def wait(self, client: IO[bytes]) -> Outcome | None:
        """Wait for all processes; the first that fails ends the others. -> None if the client is gone."""
        deadline = time.monotonic() + self._job.timeout
        while self._ranks:
            left = max(deadline - time.monotonic(), 0)
            ready, _, _ = select.select([client, *self._ranks], [], [], left)
            if client in ready:
                end_all(patience=0)
                return None
            if not ready:
                self._outcome.timed_out |= self._outcome.first_failed is None
                self._signal(signal.SIGKILL)
                deadline = time.monotonic() + PATIENCE
            elif any([self._ended(file) for file in ready]) and self._ranks:
                self._signal(signal.SIGTERM)
                deadline = min(deadline, time.monotonic() + PATIENCE)
        return self._outcome

    def _ended(self, file: int) -> bool:
        """Note how a process ended -> whether it is the first that failed."""
        rank = self._ranks.pop(file)
        _, status = os.waitpid(self._pids.pop(file), 0)
        os.close(file)
        code = self._outcome.codes[rank] = os.waitstatus_to_exitcode(status)
        if code == 0 or self._outcome.first_failed is not None:
            return False
        self._outcome.first_failed = rank
        return True

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the process group of each rank that still runs."""
        for pid in self._pids.values():
            try:
                os.killpg(pid, number)
            except ProcessLookupError:  # it does not lead its session yet
                os.kill(pid, number)


def fork(server: int) -> int:
    """Fork a process that leads its own session and ends with the server -> its number; 0 in the process."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        end_with_server(server)
    return pid


def end_with_server(server: int) -> None:
    """Let the kernel end this process when the server ends, however that ends."""
    end_with_parent()
    if os.getppid() != server:  # it ended in between
        os._exit(1)


def start_store(server: int) -> tuple[int, int]:
    """Host the store of torchrun's agent in a process, as its threads must not be forked -> pid, port."""
    reading, writing = os.pipe()
    pid = fork(server)
    if pid == 0:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, f"{store.port}\n".encode())
        while True:
            signal.pause()
    os.close(writing)
    with os.fdopen(reading) as told:
        return pid, int(told.readline())


def end_all(patience: float) -> list[str]:
    """Wait `patience` seconds for processes that ranks have left behind, then kill them -> command lines."""
    killed: dict[int, str] = {}
    end = time.monotonic() + patience
    while children := living_children():
        if time.monotonic() >= end:
            for pid in children:
                killed[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return list(killed.values())


def living_children() -> list[int]:
    """Reap the children that have ended -> the others. Orphaned descendants are children of the server."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return []
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def threads() -> list[str]:
    """Names of this process's threads."""
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


def load(modules: Sequence[str]) -> dict[str, str]:
    """Import the modules on the CPU platform -> the environment variables that the imports have set."""
    before = dict(os.environ)
    os.environ |= WITHOUT_THREADS
    if modules:
        import torch

        from megatron_dms.upstream import cpu

        torch.set_num_threads(1)
        cpu.install()
        for name in modules:
            importlib.import_module(name)
        if torch.distributed.is_initialized():
            sys.exit("fork server: the imports have made a process group, which no forked process may share")
    for name in WITHOUT_THREADS:
        del os.environ[name]
    if len(alive := threads()) > 1:
        sys.exit(f"fork server: the imports have started threads, which a fork would lose: {alive}")
    gc.collect()
    gc.freeze()  # what is here now stays for ever: a child's collections need not read and copy it
    return {name: value for name, value in os.environ.items() if before.get(name) != value}


def serve(requests: IO[bytes], replies: IO[str], added: Mapping[str, str]) -> Child | None:
    """Do the jobs of the client -> None at their end; in each forked process -> what it is to do."""
    server = os.getpid()
    for line in requests:
        job = Job(**json.loads(line))
        store, port = start_store(server) if job.torchrun else (None, 0)
        running = Running(job)
        for rank in range(job.processes or 1):
            pid = fork(server)
            if pid == 0:
                requests.close()
                replies.close()
                return Child(job, rank, port, added)
            running.add(rank, pid)
        outcome = running.wait(requests)
        if outcome is None:
            return None
        if store is not None:
            os.kill(store, signal.SIGKILL)
        outcome.leftovers = end_all(LEFTOVERS_PATIENCE if outcome.first_failed is None else 0)
        print(json.dumps(asdict(outcome)), file=replies, flush=True)
    return None


def main() -> None:
    """Import, then serve standard input; a forked process does its part of the job instead."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    added = load(sys.argv[1:])
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    print(json.dumps({"ready": os.getpid()}), file=replies, flush=True)
    child = serve(requests, replies, added)
    if child is not None:
        child.run()


if __name__ == "__main__":
    main()
