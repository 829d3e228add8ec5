"""Run generated Python programs against tests, each test in a process of its own under limits.

What this does NOT protect against: it is not a sandbox. The program runs as the same user and sees the file
system and the network. It can read, change or delete whatever that user can; it can leave its process group
(setsid) and outlive its time limit; it can write many files, each within the limit; it can forge a result.
The limits stop accidents: endless loops, too much memory or output, and fork bombs (but not of root, whom the
kernel does not limit). If you do not trust a model, run its programs in a container without network and
without anything of value.

Linux only.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

from megatron_dms.evaluation import code_driver

# No line within a block begins with a fence: such a line opens another block, and the first block was cut.
_FENCE = re.compile(
    r"^[ \t]*```[ \t]*([\w+-]*)[^\n`]*\n((?:(?![ \t]*```)[^\n]*\n)*)[ \t]*```[ \t\r]*$", re.MULTILINE
)
_PYTHON_TAGS = ("python", "python3", "py")
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


def extract_code(text: str) -> str | None:
    """Return the last fenced block tagged python (python3, py), or else the last block without a tag.

    A block that is never closed does not count, for example where the text was cut.
    """
    blocks = [(tag.lower(), textwrap.dedent(body)) for tag, body in _FENCE.findall(text)]
    tagged = [body for tag, body in blocks if tag in _PYTHON_TAGS]
    untagged = [body for tag, body in blocks if not tag]
    return next((found[-1] for found in (tagged, untagged) if found), None)


def check_code(
    text: str,
    tests: Sequence[StdinTest | CallTest],
    limits: Limits | None = None,
    python: str = sys.executable,
) -> Result:
    """Run the program in a generated text against all tests, until one fails.

    Args:
        text: holds the program where `extract_code` finds it.
        tests: at least one.
        limits: the limits of each test.
        python: the interpreter; the program can import whatever is installed for this interpreter.

    Raises:
        ValueError: there are no tests.
    """
    if not tests:
        raise ValueError("found no tests, expected at least one: nothing would be checked")
    code = extract_code(text)
    if code is None:
        return Result(Verdict.NO_CODE)
    for index, test in enumerate(tests):
        verdict, detail = _run_test(code, test, limits or Limits(), python)
        if verdict is not Verdict.PASSED:
            return Result(verdict, index, detail)
    return Result(Verdict.PASSED)


def _run_test(code: str, test: StdinTest | CallTest, limits: Limits, python: str) -> tuple[Verdict, str]:
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
        status = _run(folder, limits, python, stdin, stdout, stderr)
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
    folder: Path, limits: Limits, python: str, stdin: IO[bytes], stdout: IO[bytes], stderr: IO[bytes]
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
        [python, "-I", "-B", code_driver.__file__, json.dumps(resources)],
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
    return child.returncode if in_time else None


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
