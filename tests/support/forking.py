"""The tests' side of the fork server (tests/support/fork_server.py): processes that have Megatron imported.

    done = server.call(function, *arguments)           # one process that calls a function
    done = server.run(path, *words)                    # `python path words`
    done = server.spawn(function, arguments, 2)        # function(rank, *arguments), as torch's spawn does
    done = server.torchrun(path, words, 4)             # `torchrun --nproc-per-node 4 path words`

Functions and arguments are pickled, so a function must be importable by its name. Each call waits for the
end of all its processes and returns a subprocess.CompletedProcess; its returncode and stderr are those of the
process that failed first. In these processes the CPU platform answers for torch.cuda, and torch uses one
thread.
"""

import base64
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.fork_server import PRELOADED, Job, Outcome

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 240.0  # seconds for one job
_SHOWN = 6000  # characters of a log in an error


def one_thread() -> dict[str, str]:
    """The environment of the tests' processes: sums are made in one order, and cores are not fought over."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}


class ForkServer:
    """A running server; it ends with this object's `close` or with this process.

    environment: variables to set before libraries are imported, beside those of `one_thread()`; they hold for
    all jobs. modules: what is imported beside torch and the CPU platform; with no module nothing is imported.
    """

    def __init__(
        self, environment: Mapping[str, str] | None = None, modules: Sequence[str] = PRELOADED
    ) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the server
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.support.fork_server", *modules],
            cwd=ROOT,
            env=one_thread() | dict(environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self.pid: int | None = None
        """Of the server; None until its imports are done."""
        self.leftovers: list[str] = []
        """Command lines of processes that outlived the ranks that had started them, and were killed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server, which ends whatever it has forked."""
        self._process.communicate()
        self._errors.close()

    def run(self, path: Path, *words: str, **how: Any) -> subprocess.CompletedProcess[str]:
        """`python path words`. how: as in `_do`."""
        return self._do(str(path), list(words), None, **how)

    def call(
        self, function: Callable[..., object], *arguments: object, **how: Any
    ) -> subprocess.CompletedProcess[str]:
        """A process that calls function(*arguments). how: as in `_do`."""
        return self._do(None, [], (function, arguments), **how)

    def spawn(
        self, function: Callable[..., object], arguments: Sequence[object], processes: int, **how: Any
    ) -> subprocess.CompletedProcess[str]:
        """Processes that call function(rank, *arguments); the first that fails ends the others."""
        return self._do(None, [], (function, tuple(arguments)), processes=processes, **how)

    def torchrun(
        self, path: Path, words: Sequence[str], processes: int, **how: Any
    ) -> subprocess.CompletedProcess[str]:
        """Ranks of a script in the environment that torchrun sets; the first that fails ends the others."""
        return self._do(str(path), list(words), None, processes=processes, torchrun=True, **how)

    def _do(
        self,
        script: str | None,
        words: list[str],
        call: tuple[Callable[..., object], tuple[object, ...]] | None,
        *,
        processes: int | None = None,
        torchrun: bool = False,
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        timeout: float = TIMEOUT,
    ) -> subprocess.CompletedProcess[str]:
        """Run a job to its end.

        log: a file for both outputs; None means that they are returned. environment: the whole environment;
        None means `one_thread()`. folder: the current folder; None means this process's. timeout: seconds.

        Raises subprocess.TimeoutExpired, with the end of the outputs, when the processes had to be killed.
        """
        with tempfile.TemporaryDirectory() as scratch:
            out = log or Path(scratch) / "stdout"
            err = None if log else Path(scratch) / "stderr"
            job = Job(
                script=script,
                words=words,
                call=None if call is None else base64.b64encode(pickle.dumps(call)).decode(),
                processes=processes,
                torchrun=torchrun,
                environment=dict(one_thread() if environment is None else environment),
                folder=str(folder or Path.cwd()),
                stdout=str(out),
                stderr=None if err is None else str(err),
                timeout=timeout,
            )
            outcome = Outcome(**self._ask(job))
            self.leftovers += outcome.leftovers
            stdout = out.read_text(errors="replace")
            failed = outcome.first_failed
            shown = range(len(outcome.codes)) if failed is None else [failed]
            errors = [] if log else [Path(job.stderr_of(rank)) for rank in shown]
            stderr = "".join(path.read_text(errors="replace") for path in errors)
        command = [script or str(call and call[0]), *words]
        if outcome.timed_out:
            error = subprocess.TimeoutExpired(command, timeout, stdout, stderr)
            error.add_note((stdout + stderr)[-_SHOWN:])
            raise error
        code = 0 if failed is None else outcome.codes[failed]
        assert code is not None
        return subprocess.CompletedProcess(command, code, stdout, stderr)

    def _ask(self, job: Job) -> dict[str, Any]:
        self._wait_until_ready()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _wait_until_ready(self) -> None:
        if self.pid is None:
            self.pid = self._answer()["ready"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"the fork server has ended\n{self._errors.read()[-_SHOWN:]}")
        return json.loads(line)


def torch_spawn(server: ForkServer) -> Callable[..., None]:
    """Make a stand-in for torch.multiprocessing.spawn, whose processes the server forks.

        monkeypatch.setattr(torch.multiprocessing, "spawn", torch_spawn(fork_server))

    It raises what torch's function raises, with the errors of the process that failed first.
    """
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

    def spawn(
        function: Callable[..., object], args: tuple[object, ...] = (), nprocs: int = 1, daemon: bool = False
    ) -> None:
        done = server.spawn(function, args, nprocs, environment=os.environ)
        if done.returncode < 0:
            said = f"process terminated with signal {-done.returncode}"
            raise ProcessExitedException(said, 0, 0, done.returncode)
        if done.returncode:
            raise ProcessRaisedException(done.stderr, 0, 0)

    return spawn
