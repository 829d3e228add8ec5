"""A folder of checkpoints belongs to one run."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_dms.errors import CheckpointError
from megatron_dms.resilience.ownership import OWNER, Owner, _process, wait_for_claim


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """Another process, which is alive."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def owned_by(folder: Path, pid: int, **changes: str) -> Owner:
    """Let the folder say that it belongs to this process."""
    owner = replace(Owner.claim(folder), token="other", pid=pid, process=_process(pid) or "", **changes)
    (folder / OWNER).write_text(json.dumps(asdict(owner)))
    return owner


def test_a_living_run_keeps_its_folder(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    """Catches: a second job of the same command line, which would write over the first one's checkpoints."""
    owner = owned_by(tmp_path, other.pid)
    before = (tmp_path / OWNER).read_text()
    with pytest.raises(CheckpointError, match=f"still alive: process {other.pid} on {owner.host}"):
        Owner.claim(tmp_path)
    assert (tmp_path / OWNER).read_text() == before


def test_a_dead_run_leaves_its_folder(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    """Catches: a folder that is locked for ever by a kill -9, by a zombie, or by another process that has the
    dead one's pid; and a run on another machine taken for one on this machine."""
    owned_by(tmp_path, other.pid)
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie until somebody waits for it
    assert Owner.claim(tmp_path).pid == os.getpid()
    owner = owned_by(tmp_path, os.getppid())
    (tmp_path / OWNER).write_text(json.dumps(asdict(replace(owner, process="another boot 1"))))
    Owner.claim(tmp_path)
    owned_by(tmp_path, os.getppid(), host="elsewhere")
    Owner.claim(tmp_path)


def test_the_run_that_started_last_owns_the_folder(tmp_path: Path) -> None:
    """Catches: an older run, on a machine that the scheduler has lost, which goes on to save."""
    older = Owner.claim(tmp_path / "new")
    older.check()
    newer = Owner.claim(tmp_path / "new")
    newer.check()
    with pytest.raises(CheckpointError, match=f"another run has taken the folder over: process {newer.pid}"):
        older.check()


def test_another_rank_waits_for_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a rank that shortens the log of the run that is alive, before rank 0 is refused."""
    monkeypatch.setenv("MASTER_PORT", "1")
    Owner.claim(tmp_path)
    wait_for_claim(tmp_path, 0.0)
    monkeypatch.setenv("MASTER_PORT", "2")
    with pytest.raises(CheckpointError, match="rank 0 did not write"):
        wait_for_claim(tmp_path, 0.1)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}"])
def test_a_damaged_file_belongs_to_nobody(text: str, tmp_path: Path) -> None:
    """Catches: a traceback at the next start after a full disk."""
    owner = Owner.claim(tmp_path)
    (tmp_path / OWNER).write_text(text)
    owner.check()
    Owner.claim(tmp_path)
