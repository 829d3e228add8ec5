"""Which run a folder of checkpoints belongs to. Two runs that save into one folder would spoil both.

The run that started last owns the folder: an older one, which a scheduler may believe to be dead, ends before
it would save again. On one machine, a second run is refused while the first is alive.
"""

import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from megatron_dms.errors import CheckpointError
from megatron_dms.files import write_durably

OWNER = "owner.json"
_POLL = 0.05  # seconds


@dataclass(frozen=True)
class Owner:
    """The rank 0 of a run, as the run's folder names it."""

    save: str
    """The folder of --save."""
    token: str
    """A name that no other run has."""
    host: str
    pid: int
    process: str
    """What tells this process from a later one with the same pid."""
    rendezvous: str
    """Where the ranks of the run meet: the same on all of them, and of one living run only."""
    started: str
    """UTC."""

    @classmethod
    def claim(cls, save: Path) -> Self:
        """Make this process's run the owner of a folder.

        Raises:
            CheckpointError: the owner is another run, which is alive on this machine.
            OSError: the folder cannot be written.
        """
        host, pid = socket.gethostname(), os.getpid()
        found = _read(save / OWNER)
        alive = found.get("host") == host and found.get("process") == _process(found.get("pid"))
        if alive and found.get("pid") != pid:
            raise CheckpointError(
                f"--save {save} belongs to a run that is still alive: process {found['pid']} on {host}, "
                f"started {found.get('started')}; end that run, or choose another folder"
            )
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        owner = cls(str(save), uuid.uuid4().hex, host, pid, _process(pid) or "", _rendezvous(), now)
        save.mkdir(parents=True, exist_ok=True)
        write_durably(save / OWNER, json.dumps(asdict(owner)))
        return owner

    def check(self) -> None:
        """Check that no other run has claimed the folder since.

        Raises:
            CheckpointError: another run has.
        """
        found = _read(Path(self.save) / OWNER)
        if found.get("token", self.token) != self.token:
            raise CheckpointError(
                f"another run has taken the folder over: process {found.get('pid')} on {found.get('host')}, "
                f"started {found.get('started')}"
            )


def wait_for_claim(save: Path, seconds: float) -> None:
    """Wait until rank 0 of this run owns the folder: another rank may touch files there only then.

    If rank 0 is refused, the launcher ends this process meanwhile.

    Raises:
        CheckpointError: rank 0 did not claim the folder in time.
    """
    end = time.monotonic() + seconds
    while _read(save / OWNER).get("rendezvous") != _rendezvous():
        if time.monotonic() > end:
            raise CheckpointError(
                f"rank 0 did not write {save / OWNER} within {seconds:.0f} s: found the rendezvous "
                f"{_read(save / OWNER).get('rendezvous')}, expected {_rendezvous()}; do all nodes share "
                "--save, and spell MASTER_ADDR alike?"
            )
        time.sleep(_POLL)


def _rendezvous() -> str:
    return ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))


def _read(path: Path) -> dict[str, object]:
    """What the file says; nothing if it is missing or damaged."""
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _process(pid: object) -> str | None:
    """Name a process by this boot of the machine and its start; None if there is no such process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else f"{boot} {fields[18]}"  # starttime, field 22 of proc(5)
