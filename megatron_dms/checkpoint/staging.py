"""Outputs appear whole or not at all: a folder is filled beside its place and renamed at the end."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_dms.checkpoint.errors import CheckpointError


@contextmanager
def staged_folder(target: Path, force: bool) -> Iterator[Path]:
    """A new folder `<target>.partial-<pid>` that takes the place of `target` if the block succeeds.

    An existing target that is not empty is refused before any work, unless `force`: then it is replaced,
    after success only. On failure, an interrupt included, nothing is left behind and the old target is
    untouched.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} exists and is no folder; choose another output")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise CheckpointError(f"{target} is not empty; choose another output, or replace it with --force")
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    replaced = target.with_name(f"{target.name}.replaced-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"cannot make {partial}: {error.strerror}") from error
    try:
        yield partial
        if target.exists():
            target.rename(replaced)
        try:
            partial.rename(target)
        except BaseException:
            if replaced.exists():
                replaced.rename(target)
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
