"""run_tool: what a tool changes is put back, and nothing of what it says or raises is lost."""

import logging
import os
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.support.tools import run_tool

CHANGES = """
import logging, os, signal, sys, warnings, torch

def main():
    print("argv:", *sys.argv[1:])
    print("folder:", os.getcwd(), "variable:", os.environ["OWN"], file=sys.stderr)
    os.system("echo child; echo child-error >&2")
    sys.stdout = open(os.devnull, "w")
    sys.argv.append("x")
    sys.path.insert(0, "/nowhere")
    os.environ["LEFT"] = "1"
    del os.environ["HOME"]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.DEBUG, force=True)
    logging.disable()
    warnings.simplefilter("error")
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.manual_seed(99)
    end()

def end():
    END

if __name__ == "__main__":
    sys.exit(main())
"""


def script(folder: Path, end: str = "return None") -> str:
    """Write a script that changes everything and then does `end`; return its path."""
    path = folder / "odd.py"
    path.write_text(CHANGES.replace("END", end))
    return str(path)


WARNS = """
import logging, warnings

def main():
    warnings.warn("a warning")
    warnings.warn("hidden", DeprecationWarning)
    logging.getLogger("of a library").warning("a log line")
"""


def tool(folder: Path, text: str) -> str:
    """Write a script; return its path."""
    path = folder / "tool.py"
    path.write_text(text)
    return str(path)


def state() -> dict[str, object]:
    return {
        "argv": sys.argv[:],
        "path": sys.path[:],
        "folder": Path.cwd(),
        "environment": dict(os.environ),
        "streams": (sys.stdout, sys.stderr, os.fstat(1).st_ino, os.fstat(2).st_ino),
        "signal": signal.getsignal(signal.SIGTERM),
        "logging": (logging.root.level, logging.root.handlers[:], logging.root.manager.disable),
        "warnings": warnings.filters[:],
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
        "random": torch.get_rng_state().tolist(),
    }


def test_everything_is_put_back(tmp_path: Path) -> None:
    """Catches: a later test in another folder, with another type, without its streams; output that is lost;
    a word that is not passed on."""
    odd = script(tmp_path)
    (tmp_path / "work").mkdir()
    before = state()
    done = run_tool(odd, "a", 1, cwd=tmp_path / "work", env={"OWN": "mine"})
    assert state() == before
    assert done.status == 0
    assert done.out.splitlines() == ["argv: a 1", "child"]
    assert done.errors == [f"folder: {tmp_path / 'work'} variable: mine", "child-error"]


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('a reason')", 1, "a reason"),
        ("raise SystemExit(True)", 1, ""),
    ],
)
def test_exits_are_statuses(end: str, status: int, said: str, tmp_path: Path) -> None:
    """Catches: an exit that ends the tests, or one whose status or reason is lost."""
    odd = script(tmp_path, end)
    for process in (False, True):
        done = run_tool(odd, env={"OWN": "mine"}, process=process)
        assert done.status == status and said in done.errors[2:] + [""], (process, done)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_comes_through(error: type[BaseException], tmp_path: Path) -> None:
    """Catches: an exception that is swallowed or made a status, and what is not put back after one."""
    odd = script(tmp_path, f"raise {error.__name__}('of the tool')")
    before = state()
    with pytest.raises(error, match="of the tool"):
        run_tool(odd, env={"OWN": "mine"})
    assert state() == before


def test_a_process_has_its_own_state(tmp_path: Path) -> None:
    """Catches: a command line, folder or environment that does not reach a process, a lost traceback."""
    odd = script(tmp_path, "raise ValueError('of the tool')")
    before = state()
    done = run_tool(odd, "b", cwd=tmp_path, env={"OWN": "mine"}, process=True)
    assert state() == before and done.status == 1
    assert done.out.startswith("argv: b\n") or "child" in done.out
    assert "ValueError: of the tool" in done.errors


def test_a_tool_is_found_by_its_name() -> None:
    """Catches: a name, or words after it, that do not reach the command."""
    for process in (False, True):
        done = run_tool("plan", "train", "--model", "qwen4", process=process)
        assert done.status == 2 and done.out == "" and len(done.errors) == 1
        assert done.error.startswith("error: ") and "'qwen4'" in done.error


def test_warnings_and_logs_are_captured(tmp_path: Path) -> None:
    """Catches: a warning, or a line of an older log handler, that goes past the tool's stderr."""
    logger = logging.getLogger("of a library")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    try:
        done = run_tool(tool(tmp_path, WARNS))
    finally:
        logger.removeHandler(handler)
    assert "UserWarning: a warning" in done.error and "a log line" in done.error and done.status == 0
    assert "hidden" not in done.error


def test_a_tool_that_hangs_is_ended(tmp_path: Path) -> None:
    """Catches: a tool that stops the whole suite."""
    with pytest.raises(TimeoutError, match=r"has not ended after 0\.2 s"):
        run_tool(tool(tmp_path, "import time\ndef main():\n    time.sleep(60)\n"), timeout=0.2)
