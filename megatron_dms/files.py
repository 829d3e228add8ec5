"""Write files and folders so that readers never see half of one, and read JSON objects.

Three promises, each for its own kind of output. `write_durably` keeps the old text or the new one, after a
kill -9 and after a power cut. `output_file` opens its file before any work is done and renames it at the end.
`staged_folder` fills a folder beside its place and renames that folder at the end: a kill -9 leaves a folder
`<target>.partial-<pid>`, and at the target either the old output or the new one, whole. A partial folder
lacks the file by which readers recognise an output (`_MARKS`): writers put that file last, and it is the
first to go when a folder is removed. `staged_folder` does not call fsync: a power cut soon after the end may
lose an output, but its source is still there, and waiting for the disk would make every conversion as slow as
that.
"""

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_dms.errors import CheckpointError

_MARKS = ("config.json", "latest_checkpointed_iteration.txt")
"""Files that make a folder a checkpoint: transformers' and Megatron's."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' renameat2


def partial_path(path: Path) -> Path:
    """Return the name beside `path` under which this process writes until the output is whole."""
    return path.with_name(f"{path.name}.partial-{os.getpid()}")


def write_durably(path: Path, text: str) -> None:
    """Write a file so that readers see either the old text or the new, after a power cut too.

    The text goes to a file beside `path` and to the disk; then the file is renamed and the folder is flushed.
    """
    beside = partial_path(path)
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


@contextmanager
def output_file(path: Path | None) -> Iterator[Callable[[str], object]]:
    """Yield a function that writes to a file beside `path`; the file is renamed if the block succeeds.

    The file is opened at once, so that an output that cannot be written is refused before any work. Without a
    path the text goes nowhere.

    Raises:
        ValueError: `path` exists, or its folder does not or is not writable.
    """
    if path is None:
        yield lambda text: None
        return
    partial = partial_path(path)
    if path.exists():
        raise ValueError(f"{path} exists; choose another output, or remove it")
    try:
        file = partial.open("x", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
    try:
        with file:
            yield file.write
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def read_object(path: Path, otherwise: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        otherwise: what the folder of the file is if the file cannot be read, such as "is not a checkpoint".

    Raises:
        ValueError: the file cannot be read, or holds no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path.parent} {otherwise}: its {path.name}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected an object")
    return found


def check_apart(target: Path, *inputs: Path) -> None:
    """Raise CheckpointError if the output is an input, lies inside one or contains one, because replacing
    the output would destroy the input. Links are followed.
    """
    out = target.resolve()
    for given in inputs:
        path = given.resolve()
        if out == path or out in path.parents or path in out.parents:
            where = "is" if out == path else "contains" if out in path.parents else "lies inside"
            raise CheckpointError(f"the output {target} {where} the input {given}; choose another output")


def leftovers(target: Path) -> list[Path]:
    """Return the folders that killed runs left beside `target`. The folders of runs that are alive on this
    machine are left out.
    """
    target = target.resolve()
    found = []
    for kind in ("partial", "replaced"):
        prefix = f"{target.name}.{kind}-"
        for path in target.parent.iterdir() if target.parent.is_dir() else ():
            pid = path.name.removeprefix(prefix)
            if path.name.startswith(prefix) and pid.isdecimal() and not Path("/proc", pid).exists():
                found.append(path)
    return sorted(found)


@contextmanager
def staged_folder(target: Path, force: bool, size: int = 0) -> Iterator[Path]:
    """Yield a new folder `<target>.partial-<pid>`, which takes the place of `target` if the block succeeds.

    size: bytes that the output will have at least; refused at once if the disk has fewer. An existing target
    that is not empty is refused before any work, unless `force`: then it is replaced, after success only. On
    failure, an interrupt included, nothing is left behind and the old target is untouched.
    """
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} exists and is no folder; choose another output")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise CheckpointError(f"{target} is not empty; choose another output, or replace it with --force")
    partial = partial_path(target)
    parents = [path for path in partial.parents if not path.exists()]
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"cannot make {partial}: {error.strerror}") from error
        free = shutil.disk_usage(partial).free
        if free < size:
            raise CheckpointError(
                f"disk full: {target} needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room or "
                "choose another disk"
            )
        yield partial
        take_place(partial, target)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise CheckpointError(
            f"disk full: {target} could not be written ({error.strerror}); make room or choose another disk"
        ) from error
    finally:
        _remove(partial)  # gone already, unfinished, or by now the old output
        if not target.exists():
            for path in parents:
                if path.is_dir():
                    path.rmdir()


def take_place(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; an existing target and `partial` change places in one step.

    Where the system or the file system cannot do that (Linux' renameat2 can, on ext4, xfs, btrfs and tmpfs),
    the old output is moved aside to `.replaced-<pid>` first: a kill between the two renames leaves it there.
    """
    if not target.exists() or not any(target.iterdir()):
        partial.rename(target)
        return
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    paths = (os.fsencode(partial), os.fsencode(target))
    if renameat2 and renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return
    replaced = target.with_name(f"{target.name}.replaced-{os.getpid()}")
    target.rename(replaced)
    try:
        partial.rename(target)
    except BaseException:
        replaced.rename(target)
        raise
    _remove(replaced)


def _remove(folder: Path) -> None:
    """Remove a folder so that no reader takes the rest for a checkpoint if this process is killed.

    Files that cannot be removed (a read-only old output) stay: the conversion itself is done, or has failed
    for a reason of its own.
    """
    with suppress(OSError):
        for name in _MARKS:
            (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
