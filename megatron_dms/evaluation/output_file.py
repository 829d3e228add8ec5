"""A result file that appears whole or not at all."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def output_file(path: Path | None) -> Iterator[Callable[[str], None]]:
    """Yields what writes the text to a file beside `path`, which is renamed if the block succeeds.

    That file is opened at once, so that what cannot be written is refused before any work. Without a path the
    text goes nowhere.

    Raises:
        ValueError: `path` exists, or its folder does not or is not writable.
    """
    if path is None:
        yield lambda text: None
        return
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
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
