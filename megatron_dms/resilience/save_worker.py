"""What an asynchronous save does in the process that a rank forks for it."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_dms.formats.checksums import digest
from megatron_dms.processes import end_with_parent


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
