"""Checksums of a finished checkpoint: which files it has, how long they are and what is in them.

`checksums.json` in the folder of an iteration, made of what was read back from the disk:

    {"files": {"__0_0.distcp": {"bytes": 1234, "sha256": "..."}, ...}, "sha256": "..."}

The last checksum is that of "files", so that a flipped bit in this file is not taken for one in another.
SHA-256, because processors compute it in hardware (1.5 GB/s a process and more), and `sha256sum FILE` checks
by hand.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_dms.errors import CheckpointError
from megatron_dms.files import write_durably

MANIFEST = "checksums.json"


@dataclass(frozen=True)
class FileSum:
    """One file: its length in bytes and its SHA-256 in hex."""

    bytes: int
    sha256: str


def digest(path: Path) -> FileSum:
    """Read a file from the disk, not from what the system remembers of writing it. Raises OSError."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())  # only clean pages can be dropped
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = hashlib.file_digest(stream, "sha256")
        return FileSum(stream.tell(), found.hexdigest())


def file_names(folder: Path) -> list[str]:
    """Return all files of a checkpoint except the checksums, relative to its folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in files if path.name != MANIFEST)


def shares(sizes: Mapping[str, int], parts: int) -> list[list[str]]:
    """Divide file names among `parts` readers, about equally many bytes each, alike on every rank."""
    loads = [0] * parts
    names: list[list[str]] = [[] for _ in range(parts)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        loads[least] += sizes[name]
        names[least].append(name)
    return names


def write_manifest(folder: Path, sums: Mapping[str, FileSum]) -> None:
    """Write the checksums of all files, which must be those that the folder holds.

    Raises:
        CheckpointError: a file without a checksum, or the other way round.
    """
    if sorted(sums) != file_names(folder):
        odd = sorted(set(sums) ^ set(file_names(folder)))
        raise CheckpointError(f"{folder}: {', '.join(odd)} appeared or vanished while it was saved")
    files = {name: asdict(sums[name]) for name in sorted(sums)}
    content = {"files": files, "sha256": _sum_of(files)}
    write_durably(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, FileSum]:
    """Read the checksums of all files. Raises CheckpointError if the checksums are damaged themselves."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        files = content["files"]
        if content["sha256"] != _sum_of(files):
            raise ValueError("its own checksum does not match")
        return {name: FileSum(**values) for name, values in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def check_sizes(folder: Path) -> dict[str, FileSum]:
    """Check that every file is there and has its length, without reading it, and return the checksums.

    Raises:
        CheckpointError: names the file, what was found and expected.
    """
    sums = read_manifest(folder)
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected.bytes:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected {expected.bytes}")
    return sums


def differences(
    folder: Path, found: Mapping[str, FileSum | str], expected: Mapping[str, FileSum]
) -> dict[str, str]:
    """Return what is wrong with each changed file, by name. found: a text says why a file was not read."""
    wrong = {}
    for name, wanted in sorted(expected.items()):
        if isinstance(was := found[name], str):
            wrong[name] = f"{folder / name} cannot be read: {was}"
        elif was != wanted:
            wrong[name] = (
                f"{folder / name} has {was.bytes} bytes, sha256 {was.sha256[:16]}, expected "
                f"{wanted.bytes} bytes, sha256 {wanted.sha256[:16]}"
            )
    return wrong


def _sum_of(files: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
