"""What happens where a checkpoint's files are written: in the rank itself, or in a process that it forks.

Megatron's writer (`FileSystemWriterAsync.write_preloaded_data`, megatron-core 0.19.2) returns its failures,
and its caller keeps no more of them than the name of their type; of one that is raised it keeps the message.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.managers import SyncManager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import multiprocessing

from megatron_dms.formats.checksums import digest
from megatron_dms.resilience.collective_steps import root_cause
from megatron_dms.resilience.orphans import end_with_parent


def install(writer: ModuleType) -> None:
    """Let Megatron's writer name its failures, and its helper process end with this one.

    writer: megatron.core.dist_checkpointing.strategies.filesystem_async. The queue that results go through
    belongs to a process of its own, which a rank ended by kill -9 would leave behind for ever.
    """
    write = writer.FileSystemWriterAsync.write_preloaded_data

    def write_preloaded_data(*args: Any, **named: Any) -> Any:
        found = write(*args, **named)
        if isinstance(found[1], Exception):
            path = named["write_bucket"][0]
            raise RuntimeError(f"{path} could not be written: {root_cause(found[1])}") from found[1]
        return found

    writer.FileSystemWriterAsync.write_preloaded_data = staticmethod(write_preloaded_data)

    def get_write_results_queue(mp_mode: str = "spawn") -> Any:
        if writer._results_queue is None:
            manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
            manager.start(end_with_parent)
            writer._results_queue = manager.Queue()
        return writer._results_queue

    writer.get_write_results_queue = get_write_results_queue


def write_and_digest(write: Callable, folder: Path, note: Path, *args: Any, **named: Any) -> None:
    """An asynchronous save's work in its process: Megatron's `write`, then the checksums of what it wrote.

    args: of `write`; the second are its files, as (path, name, content). note: where the checksums go; they
    are not there if a file could not be written, which `write` itself reports.
    """
    end_with_parent()
    write(*args, **named)
    try:
        sums = {name: asdict(digest(folder / name)) for _, name, _ in args[1]}
        note.write_text(json.dumps(sums))
    except OSError as error:  # the ranks read the files themselves then, and meet it there
        print(f"{folder} could not be read back: {error}", file=sys.stderr, flush=True)
