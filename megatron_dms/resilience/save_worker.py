"""The processes that help a rank to save: how they end with the rank, and what an asynchronous save does.

Nothing heavy is imported here, because a spawned helper process imports this module first.
"""

import ctypes
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_dms.formats.checksums import digest

_PR_SET_PDEATHSIG = 1  # an option of Linux' prctl


def end_with_parent() -> None:
    """Ask the kernel to end this process when its parent ends, however the parent ends (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def write_and_digest(
    write: Callable[..., None],
    files_of: Callable[[tuple[Any, ...]], list[str]],
    folder: Path,
    note: Path,
    *args: Any,
    **named: Any,
) -> None:
    """Do an asynchronous save's work in its process: write the files, then compute their checksums.

    Args:
        write: Megatron's function, called with `args` and `named`.
        files_of: the names of the files that `write` writes, from `args`.
        folder: where the files are.
        note: where the checksums are written to. The note is missing if a file could not be written, which
            `write` itself reports.
    """
    end_with_parent()
    write(*args, **named)
    try:
        sums = {name: asdict(digest(folder / name)) for name in files_of(args)}
        note.write_text(json.dumps(sums))
    except OSError as error:  # the ranks read the files themselves then, and meet the error there
        print(f"{folder} could not be read back: {error}", file=sys.stderr, flush=True)
