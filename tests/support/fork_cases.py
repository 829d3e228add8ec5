"""What forked processes do in the tests of the fork server; nothing heavy is imported."""

import os
import subprocess
import time
from pathlib import Path

LONG = 1000  # seconds: longer than any test
SOON = 20.0  # seconds


def note(folder: Path) -> None:
    """Leave the numbers of this process and of its parent."""
    part = folder / f"{os.getpid()}.part"
    part.write_text(f"{os.getpid()} {os.getppid()}")
    part.rename(folder / f"{os.getpid()}.pid")


def noted(folder: Path, processes: int) -> set[int]:
    """The numbers that `note` has left, once all processes have."""
    end = time.monotonic() + SOON
    while len(files := list(folder.glob("*.pid"))) < processes and time.monotonic() < end:
        time.sleep(0.02)
    assert len(files) == processes
    return {int(number) for file in files for number in file.read_text().split()}


def gone(pids: set[int]) -> bool:
    """Whether none of these processes is there after a while, not even as a zombie."""
    end = time.monotonic() + SOON
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def fail(rank: int, folder: Path) -> None:
    """Rank 1 fails once the others are asleep."""
    note(folder)
    if rank != 1:
        time.sleep(LONG)
    noted(folder, 3)
    raise RuntimeError("rank 1 has met an error")


def hang(rank: int, folder: Path) -> None:
    """Say something, and sleep."""
    print(f"rank {rank} sleeps")
    note(folder)
    time.sleep(LONG)


def leave_a_process(folder: Path) -> None:
    """End before a process that was started in a session of its own."""
    left = subprocess.Popen(["sleep", str(LONG)], start_new_session=True)
    (folder / "left").write_text(str(left.pid))
