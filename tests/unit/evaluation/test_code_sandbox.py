"""What a generated program can reach in its sandbox, and what happens without one."""

import os
import sys
import time
from pathlib import Path

import pytest

from megatron_dms.evaluation import code_answers
from megatron_dms.evaluation.code_answers import Limits, StdinTest, Verdict, check_code, sandbox_refusal
from megatron_dms.evaluation.tasks import load_task

needs_sandbox = pytest.mark.skipif(sandbox_refusal() is not None, reason="the system allows no sandbox")


def said(code: str, **options: bool) -> str:
    """Return what a program prints, or how it fails."""
    return check_code(f"```python\n{code}\n```", [StdinTest("", "@@")], **options).detail.strip()


@needs_sandbox
def test_files(tmp_path: Path) -> None:
    """Catches: a root that can be written, a home or temporary files that are shown, privileges with which
    the root can be mounted anew."""
    mine = tmp_path / "mine"
    mine.write_text("x")
    assert "FileNotFoundError" in said(f"import os\nos.remove({str(mine)!r})") and mine.exists()
    beside = said(f"open({__file__!r} + 'x', 'w')")
    assert "Errno 30" in beside or "Errno 2" in beside
    outside = Path(f"/etc/dms_test_{os.getpid()}")
    assert "Errno 30" in said(f"open({str(outside)!r}, 'w')") and not outside.exists()
    own = "import os\nopen('/tmp/a', 'w').write('b')\nprint(open('/tmp/a').read(), os.listdir('.'))"
    assert said(own) == "b ['program.py']"
    home = os.path.expanduser("~")
    for name in said(f"import os\nprint(*os.listdir({home!r}))").split():  # what the interpreter needs
        assert any(path.startswith(f"{home}/{name}") for path in (sys.prefix, sys.base_prefix, *sys.path)), (
            name
        )
    remount = "import ctypes\nprint(ctypes.CDLL(None).mount(None, b'/', None, 32 | 4096, None))"
    assert said(remount) == "-1"
    assert (
        said("print(*[line.split()[1] for line in open('/proc/self/status') if 'CapEff' in line])")
        == "0" * 16
    )


@needs_sandbox
def test_processes_network_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: the evaluator's environment through /proc, its processes, a network, a process that outlives
    its test although it left the group."""
    monkeypatch.setenv("A_TOKEN", "s3cret")
    every = "import os\nfor n in os.listdir('/proc'):\n    if n.isdigit():\n        print(n)"
    assert set(said(every).split()) <= {"1", "2"}
    token = (
        "import glob\nfor path in glob.glob('/proc/[0-9]*/environ'):\n    try:\n"
        "        print('A_TOKEN' in open(path).read())\n    except OSError:\n        pass"
    )
    assert "True" not in said(token)
    assert said(f"import os\nos.kill({os.getpid()}, 0)").endswith(
        "ProcessLookupError: [Errno 3] No such process"
    )
    connect = "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)"
    assert "Network is unreachable" in said(connect) or "Cannot assign requested address" in said(connect)
    leave = "os.setsid()\n    os.execvp('sleep', ['sleep', '61.0625'])"
    daemon = f"import os, time\nif os.fork() == 0:\n    {leave}\ntime.sleep(0.3)"
    said(daemon)
    deadline = time.monotonic() + 5
    while alive := _processes("61.0625"):
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
    hanging = check_code(
        f"```python\n{daemon}\ntime.sleep(60)\n```", [StdinTest("", "")], Limits(wall_seconds=1.5)
    )
    assert hanging.verdict == Verdict.TIMEOUT
    time.sleep(0.5)
    assert not _processes("61.0625")


def _processes(word: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:
            continue
        if word in words:
            found.append(str(path))
    return found


def test_without_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: programs that run without a sandbox though nobody asked for that, and a message that does not
    say what to do."""
    monkeypatch.setattr(code_answers, "sandbox_refusal", lambda python: "found no sandbox")
    with pytest.raises(ValueError, match=r"found no sandbox; .*--no-sandbox"):
        said("print(1)")
    assert said("print(1)", sandbox=False) == "1"


def test_the_task_says_what_it_executes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a task that needs a sandbox and notices late, or does not say that it executes programs."""
    from megatron_dms.evaluation.tasks import livecodebench

    monkeypatch.setattr(livecodebench, "sandbox_refusal", lambda: "found no sandbox")
    with pytest.raises(ValueError, match=r"found no sandbox; .*--no-sandbox"):
        load_task("livecodebench", tmp_path)
    with pytest.raises(ValueError, match=r"found sandbox 'yes', expected one of required, none"):
        load_task("livecodebench", tmp_path, sandbox="yes")
