"""Generated programs under limits: each verdict, and what a program sees and leaves."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_dms.evaluation.code_answers import (
    CallTest,
    Limits,
    Result,
    StdinTest,
    Verdict,
    check_code,
    extract_code,
    sandbox_refusal,
)

SHORT = Limits(wall_seconds=5.0, cpu_seconds=2, memory_bytes=512 << 20, file_bytes=1 << 20)


def fenced(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nDone."


# Without a sandbox on this machine, the same must hold without one.
SANDBOX = sandbox_refusal() is None


def check(code: str, *tests: StdinTest | CallTest, limits: Limits = SHORT, sandbox: bool = SANDBOX) -> Result:
    return check_code(fenced(code), tests, limits, sandbox=sandbox)


def test_extract_code() -> None:
    """Catches: the first block, the output that is shown after it, a block that was cut, indentation kept."""
    assert extract_code("```python\na\n```\n```py\nb\n```\n```\n1 2\n```") == "b\n"
    assert extract_code("```Python3\na\n```\nand ```x``` and\n```json\n{}\n```") == "a\n"
    assert extract_code("```\na\n```\n```\nb\n```") == "b\n"
    assert extract_code("1. so\n   ```python\n   if x:\n       a\n   ```") == "if x:\n    a\n"
    assert extract_code("```python\na\n```\n```python\nb") == "a\n"
    assert extract_code("```python\nb") is None
    assert extract_code("```python\na\n(cut)\n```python\nb\n```") == "b\n"
    assert extract_code("```\n(stray)\n```python\nb\r\n```\r\nend") == "b\r\n"
    assert extract_code("```1 + 1```\nprose\n```\nb\n```") == "b\n"
    assert extract_code("```cpp\nint a;\n```") is None
    assert extract_code("print(1)") is None


ADD = "a, b = map(int, input().split())\nprint(a + b)"
BLOCKS = {
    "text after the closing fence": f"```python\n{ADD}\n``` This runs in O(1).",
    "more backquotes": f"`````python\n{ADD}\n`````",
    "another tag": f"```Python3.11\n{ADD}\n```",
    "a tag in braces": f"```{{.python}}\n{ADD}\n```",
    "a tag with a file name": f"```py title=main.py\n{ADD}\n```",
    "tildes": f"Here:\n~~~py\n{ADD}\n~~~",
    "fence after a text": f"My program: ```python\n{ADD}\n```",
    "fence at the end of a line": f"```python\n{ADD}``` ",
    "opened, not closed": f"Here:\n```python\n{ADD}\n",
    "closed, not opened": f"Here is the program:\n\n{ADD}\n```\n",
    "marks of another kind": f"[PYTHON]\n{ADD}\n[/PYTHON]",
    "HTML": f"<code>\n{ADD}\n</code>",
    "LaTeX": f"\\begin{{lstlisting}}[language=Python]\n{ADD}\n\\end{{lstlisting}}",
    "a fence in a string": f"```python\nx = '''\n```python\n1\n```\n'''\n{ADD}\n```",
    "text right after the closing fence": f"```python\n{ADD}\n```That is all.",
    "a block of blocks": f"````markdown\n```python\n{ADD}\n```\n````",
    "a fence in a comment": f"```python\n# ```\n{ADD}\n```",
    "a text's tag": f"```code\n{ADD}\n```",
    "what it prints": f"```python\n{ADD}\n```\n```python\n3\n```",
    "what it reads": f"```python\n{ADD}\n```\n```python\n1 2\n```",
    "a session after it": f"```python\n{ADD}\n```\n```python\n>>> 1 + 1\n2\n```",
    "a use after it": f"```python\n{ADD}\ndef f(x):\n    return x\n```\n```python\nprint(f(1))\n```",
    "thoughts before it": f"<think>```python\nprint(0)\n```</think>```python\n{ADD}\n```",
}


@pytest.mark.parametrize("case", BLOCKS)
def test_fences_of_other_kinds(case: str) -> None:
    """Catches: a fence that is not known, a fence in a program taken for the program's end, an example of
    the program's use taken for the program."""
    assert ADD in (extract_code(BLOCKS[case]) or "")


def test_no_program() -> None:
    """Catches: a draft in thoughts that were cut off, prose or half a program as a program, a later block
    passed over because an earlier one gives a name that it imports itself."""
    assert extract_code(f"<think>Perhaps\n```python\n{ADD}\n```\nNo, that is") is None
    assert extract_code("I cannot.\n```\n") is None
    assert extract_code("```python\nfor x in\n") is None
    assert extract_code(
        "```python\ndef gcd(a, b):\n    return 1\n```\n```python\nfrom math import gcd\ngcd(1, 2)\n```"
    ) == ("from math import gcd\ngcd(1, 2)\n")


def test_numbers_of_other_kinds() -> None:
    """Catches: Python's limit of 4,300 digits in the program or in the comparison, NumPy's scalars and arrays
    as no JSON, a name that LiveCodeBench's prelude gives."""
    digits = "7" * 6000
    assert check("print(int(input()) + 1)", StdinTest(digits, digits[:-1] + "8")).verdict == Verdict.PASSED
    assert (
        check("def f(x):\n    return x * 10**5000", CallTest("f", [3], 3 * 10**5000)).verdict
        == Verdict.PASSED
    )
    assert check("def f(x):\n    return x", CallTest("f", [10**5000], 10**5000)).verdict == Verdict.PASSED
    for returned, expected in (
        ("numpy.int64(3)", 3),
        ("numpy.float32(0.5)", 0.5),
        ("numpy.bool_(True)", True),
        ("[numpy.arange(2), (numpy.int8(1),)]", [[0, 1], [1]]),
        ("{numpy.int64(1): numpy.str_('x')}", {"1": "x"}),
    ):
        code = f"import numpy\ndef f():\n    return {returned}"
        limits = Limits(memory_bytes=4 << 30)
        assert check(code, CallTest("f", [], expected), limits=limits) == Result(Verdict.PASSED), returned
    assert check(
        "print(timedelta(days=2).days, dumps([1]), StringIO('x').read())", StdinTest("", "2 [1] x")
    ) == (Result(Verdict.PASSED))


def test_stdin() -> None:
    """Catches: output compared as a whole text (spaces at ends), or so loosely that lines or digits go."""
    add = "print(sum(map(int, input().split())))\nprint('é', end='  ')"
    assert check(add, StdinTest("1 2\n", "3\né\n"), StdinTest("5 5", "10 \né")) == Result(Verdict.PASSED)
    assert check(add, StdinTest("1 2\n", "3\né"), StdinTest("1 2\n", "4\né")) == Result(
        Verdict.WRONG_ANSWER, 1, "3\né  "
    )
    for expected, found, same in (
        ("1.0 2", "1.00 2.0", True),
        ("0.1", "0.10000001", False),
        ("1\n2", "1 2", False),
        ("a b\nc", "a b  \n  c", True),
        ("a\n", "\n\na", True),
        ("a\n\nb", "a\nb", False),
        ("ab", "a b", False),
        ("1", "", False),
        ("1", "1\n2", False),
        ("sNaN", "1", False),
    ):
        verdict = check(f"print({found!r})", StdinTest("", expected)).verdict
        assert verdict == (Verdict.PASSED if same else Verdict.WRONG_ANSWER), (expected, found)


def test_main_guard_and_binary_input() -> None:
    """Catches: a program run as a module of another name; standard input that is no file."""
    code = (
        "import sys\nif __name__ == '__main__':\n    print(len(sys.stdin.buffer.read()), not open(0).read())"
    )
    assert check(code, StdinTest("é\n", "3 True")).verdict == Verdict.PASSED


CALLS: dict[str, tuple[str, Any, Verdict]] = {
    "function": ("def f(a, b):\n    return a + b", 3, Verdict.PASSED),
    "class": (
        "class Solution:\n    def f(self, a: int, b: int) -> List[int]:\n        return (b, a)",
        [2, 1],
        Verdict.PASSED,
    ),
    "modules": (
        (
            "def f(a, b):\n    stdin.read()\n"
            "    assert deepcopy([a]) == copy.copy([a]) and maxsize and Counter('a')\n"
            "    assert json.loads('1') == mean([1]) and datetime.date(2024, 1, 1) and random.random() < 2\n"
            "    return bisect.bisect_left([1, 2, 3], 3) + bisect_left([1], 2)"
        ),
        3,
        Verdict.PASSED,
    ),
    "names": ("def f(a, b):\n    return pow(3, b, 7) * gcd(4, 6) + len(deque())", 4, Verdict.PASSED),
    "wrong": ("def f(a, b):\n    return 4", 3, Verdict.WRONG_ANSWER),
    "no JSON": ("def f(a, b):\n    return {1}", "{1}", Verdict.WRONG_ANSWER),
    "output aside": ("def f(a, b):\n    print('x')\n    return None", None, Verdict.PASSED),
    "no function": ("def g(a, b):\n    return 3", 3, Verdict.RUNTIME_ERROR),
    "ends early": ("import sys\nsys.exit(0)", 3, Verdict.RUNTIME_ERROR),
    "bad result": (
        "import os\ndef f(a, b):\n    open('result.json', 'w').write('[' * 99999)\n    os._exit(0)",
        3,
        Verdict.RUNTIME_ERROR,
    ),
    "main guard": ("def f(a, b):\n    return 3\nif __name__ == '__main__':\n    f(1)", 3, Verdict.PASSED),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls(case: str) -> None:
    """Catches: an early exit that counts as passed, results compared as text, math's pow over the built-in, a
    result file that breaks the evaluation."""
    code, expected, verdict = CALLS[case]
    assert check(code, CallTest("f", (1, 2), expected)).verdict == verdict


ENDS = {
    "raises": ("print(1)\n1 / 0", Verdict.RUNTIME_ERROR, "ZeroDivisionError"),
    "syntax": ("def broken(:", Verdict.RUNTIME_ERROR, "SyntaxError"),
    "surrogate": ("x = '\udc80'", Verdict.RUNTIME_ERROR, "UnicodeDecodeError"),
    "status": ("import sys\nprint(1)\nsys.exit(3)", Verdict.RUNTIME_ERROR, "exit status 3"),
    "signal": ("import os\nos.kill(os.getpid(), 11)", Verdict.RUNTIME_ERROR, "exit status -11"),
    "memory": ("x = bytearray(1 << 30)", Verdict.MEMORY, ""),
    "file": (
        "open('f', 'wb', 0).write(bytes(2 << 20))\nopen('f', 'ab', 0).write(b'x')",
        Verdict.RUNTIME_ERROR,
        "File too large",
    ),
    "output": ("print('x' * (2 << 20), flush=True)", Verdict.RUNTIME_ERROR, "File too large"),
    "stderr": (
        "import sys\nprint('x' * 100000 + 'end', file=sys.stderr)\nsys.exit(1)",
        Verdict.RUNTIME_ERROR,
        "xend",
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_ends(case: str) -> None:
    """Catches: an exit status that is ignored after the right output, a limit that is not set."""
    code, verdict, detail = ENDS[case]
    result = check(code, StdinTest("", "1"))
    assert (result.verdict, result.failed_test) == (verdict, 0) and detail in result.detail
    assert len(result.detail) <= 2000


def test_wall_time() -> None:
    """Catches: CPU time alone, which sleep does not use; a group that lives on; pipes that a child keeps
    open."""
    start = time.monotonic()
    sleep = "import subprocess, time\nsubprocess.Popen(['sleep', '60'])\ntime.sleep(60)"
    limits = Limits(wall_seconds=0.7)
    assert check(sleep, StdinTest("", ""), limits=limits).verdict == Verdict.TIMEOUT
    assert time.monotonic() - start < 4


def test_cpu_time() -> None:
    """Catches: a busy loop that lasts as long as the wall time allows."""
    start = time.monotonic()
    limits = Limits(wall_seconds=30.0, cpu_seconds=1)
    assert check("while True:\n    pass", StdinTest("", ""), limits=limits).verdict == Verdict.TIMEOUT
    assert time.monotonic() - start < 15


def test_nothing_stays_behind(tmp_path: Path) -> None:
    """A child that the program leaves running is killed when it ends, and its folder is gone.

    Catches: the group killed on a timeout only; a folder that is kept.
    """
    code = "import os, subprocess\nprint(subprocess.Popen(['sleep', '60']).pid, os.getcwd())"
    pid, folder = check(code, StdinTest("", ""), sandbox=False).detail.split()
    assert not Path(folder).exists()
    deadline = time.monotonic() + 5
    while (state := _state(int(pid))) not in (None, "Z") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state in (None, "Z")


def _state(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return None


def test_what_a_program_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: the caller's environment, modules beside the driver, limits that are not
    set."""
    monkeypatch.setenv("A_SECRET", "1")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    code = (
        "import json, os, resource, sys\n"
        "limits = [resource.getrlimit(getattr(resource, 'RLIMIT_' + name))\n"
        "          for name in ('AS', 'FSIZE', 'NPROC', 'CORE', 'CPU')]\n"
        "print(json.dumps([sorted(os.environ), sys.argv, os.listdir(), sys.flags.isolated, limits,\n"
        "                  any('evaluation' in path for path in sys.path), os.getpgid(0) == os.getpid()]))"
    )
    seen = json.loads(check(code, StdinTest("", "")).detail)
    assert set(seen[0]) <= {"HOME", "LC_CTYPE", "OPENBLAS_NUM_THREADS", "PATH", "TMPDIR"}
    assert seen[1:4] == [["program.py"], ["program.py"], 1] and seen[5:] == [False, True]
    assert seen[4] == [[512 << 20] * 2, [1 << 20] * 2, [4096] * 2, [0, 0], [2, 3]]


def test_no_code_and_no_tests() -> None:
    """Catches: no code as passed, no tests as passed."""
    assert check_code("I cannot.", [StdinTest("", "")]) == Result(Verdict.NO_CODE)
    with pytest.raises(ValueError, match="found no tests"):
        check_code(fenced("print(1)"), [])
