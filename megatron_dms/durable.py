"""Small files that are whole or not there, after a kill -9 and after a power cut."""

import os
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Write beside, flush to the disk, rename, flush the folder: readers see the old text or the new."""
    beside = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries: a file's own fsync does not promise that its name is on the disk."""
    entries = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(entries)
    finally:
        os.close(entries)
