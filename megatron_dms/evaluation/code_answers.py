"""Run generated Python programs against tests, each test in a process of its own under limits.

Each program runs in a sandbox (code_sandbox.py), if the system allows one: without network, environment and
other processes, with a root that can only be read. Files outside the user's home can be read. Without a
sandbox, a program runs as the same user: it can read, change or delete whatever that user can, read the
evaluator's environment, use the network and leave processes behind. Then the limits stop accidents only, and
`check_code` refuses to run unless it is told otherwise. A program can forge its own result in either case.

Linux only.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import IO, Any

from megatron_dms.evaluation import code_driver, code_sandbox
from megatron_dms.evaluation.code_blocks import extract_code

WITHOUT_SANDBOX = "run in a container that has one, or give --no-sandbox to run them as this user"
_DETAIL_CHARACTERS = 2000


class Verdict(StrEnum):
    """How a program did on a test."""

    PASSED = "passed"
    WRONG_ANSWER = "wrong answer"
    RUNTIME_ERROR = "runtime error"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    NO_CODE = "no code found"


@dataclass(frozen=True)
class Limits:
    """Limits of one test."""

    wall_seconds: float = 12.0
    cpu_seconds: int = 6
    memory_bytes: int = 2 << 30
    """Limit of the address space, which is larger than the memory in use; beyond it is a MemoryError."""
    file_bytes: int = 16 << 20
    """Limit of each file that is written, standard output and standard error included."""
    processes: int = 4096
    """RLIMIT_NPROC counts all processes and threads of this user on the machine. It does not limit root."""


@dataclass(frozen=True)
class StdinTest:
    """A program that reads standard input and writes standard output.

    The output is compared line by line, without white space at the ends of lines and of the whole output.
    Lines with different texts are equal if their words are equal decimal numbers (1.0 and 1.00).
    """

    stdin: str
    stdout: str


@dataclass(frozen=True)
class CallTest:
    """A function, or a method of class Solution, for which `function(*arguments) == expected` must hold.

    All values are JSON values. Results are compared as JSON (a tuple is a list), and numbers exactly.
    """

    function: str
    arguments: Sequence[Any]
    expected: Any


@dataclass(frozen=True)
class Result:
    """How a program did on all tests."""

    verdict: Verdict
    failed_test: int | None = None
    """Index of the first test that did not pass; later tests are not run."""
    detail: str = ""
    """The end of standard error, or what the program printed or returned instead."""


def check_code(
    text: str,
    tests: Sequence[StdinTest | CallTest],
    limits: Limits | None = None,
    python: str = sys.executable,
    sandbox: bool = True,
) -> Result:
    """Run the program in a generated text against all tests, until one fails.

    Args:
        text: holds the program where `extract_code` finds it.
        tests: at least one.
        limits: the limits of each test.
        python: the interpreter; the program can import whatever is installed for this interpreter.
        sandbox: False runs the program as this user, with all that this user may do.

    Raises:
        ValueError: there are no tests, or a sandbox is wanted and the system allows none.
    """
    if not tests:
        raise ValueError("found no tests, expected at least one: nothing would be checked")
    if sandbox and (refusal := sandbox_refusal(python)):
        raise ValueError(f"{refusal}; {WITHOUT_SANDBOX}")
    allow_long_numbers()
    code = extract_code(text)
    if code is None:
        return Result(Verdict.NO_CODE)
    for index, test in enumerate(tests):
        verdict, detail = _run_test(code, test, limits or Limits(), python, sandbox)
        if verdict is not Verdict.PASSED:
            return Result(verdict, index, detail)
    return Result(Verdict.PASSED)


def allow_long_numbers() -> None:
    """Let this process read and write whole numbers of as many digits as the programs may have."""
    if 0 < sys.get_int_max_str_digits() < code_driver.MOST_DIGITS:
        sys.set_int_max_str_digits(code_driver.MOST_DIGITS)


def _run_test(
    code: str, test: StdinTest | CallTest, limits: Limits, python: str, sandbox: bool
) -> tuple[Verdict, str]:
    with (
        tempfile.TemporaryDirectory(prefix="dms_code_", ignore_cleanup_errors=True) as name,
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
    ):
        folder = Path(name)
        # A lone surrogate in generated text has no UTF-8 form; such a program fails to compile, as it should.
        (folder / "program.py").write_bytes(code.encode("utf-8", "surrogatepass"))
        if isinstance(test, CallTest):
            call = {"function": test.function, "arguments": list(test.arguments)}
            (folder / "call.json").write_text(json.dumps(call), encoding="utf-8")
        else:
            stdin.write(test.stdin.encode("utf-8"))
            stdin.seek(0)
        status = _run(folder, limits, python, sandbox, stdin, stdout, stderr)
        error = _tail(stderr)
        if status is None or status == -signal.SIGXCPU:
            return Verdict.TIMEOUT, error
        if status == code_driver.MEMORY_EXIT:
            return Verdict.MEMORY, error
        if status != 0:
            return Verdict.RUNTIME_ERROR, error or f"exit status {status}"
        if isinstance(test, StdinTest):
            stdout.seek(0)
            found = stdout.read().decode("utf-8", "replace")
            return _verdict(_same_output(test.stdout, found), found)
        try:
            result = (folder / "result.json").read_text(encoding="utf-8")
            same = json.loads(json.dumps(test.expected)) == json.loads(result)
        except (OSError, ValueError, RecursionError):
            return Verdict.RUNTIME_ERROR, error or f"{test.function} did not return a result"
        return _verdict(same, result)


def _run(
    folder: Path,
    limits: Limits,
    python: str,
    sandbox: bool,
    stdin: IO[bytes],
    stdout: IO[bytes],
    stderr: IO[bytes],
) -> int | None:
    """Return the exit status, negative for a signal; None if the wall time ran out."""
    resources = {
        "CPU": limits.cpu_seconds,
        "AS": limits.memory_bytes,
        "FSIZE": limits.file_bytes,
        "NPROC": limits.processes,
        "CORE": 0,
    }
    child = subprocess.Popen(
        [
            python,
            "-I",
            "-B",
            code_driver.__file__,
            json.dumps(resources),
            *(_sandbox(python) if sandbox else ()),
        ],
        cwd=folder,
        # One thread, because each thread of BLAS reserves address space.
        env={"PATH": os.defpath, "HOME": str(folder), "TMPDIR": str(folder), "OPENBLAS_NUM_THREADS": "1"},
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )
    deadline = time.monotonic() + limits.wall_seconds
    try:
        # Wait without reaping: until the leader is reaped, the number of its group is not used again.
        ended = select.poll()
        handle = os.pidfd_open(child.pid)
        try:
            ended.register(handle, select.POLLIN)
            in_time = bool(ended.poll(max(deadline - time.monotonic(), 0) * 1000))
        finally:
            os.close(handle)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if not in_time:
        return None
    # Out of a sandbox a signal comes as 128 and its number, as from a shell.
    return 128 - child.returncode if sandbox and 128 < child.returncode <= 192 else child.returncode


@cache
def _sandbox(python: str) -> tuple[str]:
    """Return the driver's argument that describes the sandbox."""
    command = "import json, sys; print(json.dumps([sys.prefix, sys.base_prefix, *sys.path]))"
    done = subprocess.run([python, "-I", "-c", command], capture_output=True, text=True, check=True)
    kept = [path for path in json.loads(done.stdout) if os.path.isdir(path)]
    home = os.path.realpath(os.path.expanduser("~"))
    homes = [
        path for path in dict.fromkeys([home, "/home", "/root"]) if path != "/" and os.access(path, os.X_OK)
    ]
    shown = [os.path.realpath(path) for path in kept] + kept
    return (json.dumps({"code": code_sandbox.__file__, "homes": homes, "kept": sorted(set(shown), key=len)}),)


@cache
def sandbox_refusal(python: str = sys.executable) -> str | None:
    """Return why this system allows no sandbox, in one line; None if it does."""
    verdict, detail = _run_test("print(1)", StdinTest("", "1"), Limits(), python, True)
    if verdict is Verdict.PASSED:
        return None
    reason = (detail.splitlines() or [str(verdict)])[-1]
    return f"found no sandbox for generated programs ({reason}), expected Linux 5.12 with user namespaces"


def _tail(file: IO[bytes]) -> str:
    file.seek(max(file.seek(0, os.SEEK_END) - _DETAIL_CHARACTERS, 0))
    return file.read().decode("utf-8", "replace").strip()


def _verdict(same: bool, found: str) -> tuple[Verdict, str]:
    return (Verdict.PASSED, "") if same else (Verdict.WRONG_ANSWER, found[:_DETAIL_CHARACTERS])


def _same_output(expected: str, found: str) -> bool:
    lines = [[line.strip() for line in text.strip().split("\n")] for text in (expected, found)]
    return len(lines[0]) == len(lines[1]) and all(map(_same_line, *lines))


def _same_line(expected: str, found: str) -> bool:
    if expected == found:
        return True
    try:
        return [Decimal(word) for word in expected.split()] == [Decimal(word) for word in found.split()]
    except InvalidOperation:
        return False
