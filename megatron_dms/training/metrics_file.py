"""metrics.jsonl: every scalar that Megatron logs, one line per training step, with or without other loggers.

    {"step": 7, "time": 1764000000.1, "learning-rate": 3e-05, "KL": 0.41, ..., "KL validation": 0.44}

A run that resumes from step S drops the lines after S first, so the file reads as if it had never stopped.
Each scalar is in its step's line as soon as it is logged: the line is written anew. A value that is no finite
number is null.
"""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from megatron_dms.files import write_durably

NAME = "metrics.jsonl"
_BY_SAMPLES = " vs samples"  # Megatron logs each scalar once more over the number of samples; no step there


class MetricsFile:
    """The file, open for the lines after `step`.

    dropped: the last step whose line was dropped, or None.

    Raises:
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.dropped = self._open(step)

    def _open(self, step: int) -> int | None:
        """Keep the lines up to `step` -> the last step of the others, None if there were none."""
        kept, dropped = _lines_until(self.path, step)
        write_durably(self.path, b"".join(kept).decode())
        self._file = self.path.open("r+b", buffering=0)
        # The line under way: a finished run that is started once more validates at its last step again.
        self._line: dict[str, Any] = json.loads(kept[-1]) if kept else {"step": -1}
        self._begin = sum(map(len, kept[:-1]))
        return dropped

    def add(self, name: str, value: float, step: int) -> None:
        """Put one scalar into the line of its step, the last one or a new one."""
        if step < self._line["step"]:  # the checkpoint was damaged, and the one before it was resumed
            self._open(step - 1)
        if step > self._line["step"]:
            self._begin = self._file.seek(0, os.SEEK_END)
            self._line = {"step": step}
        number = float(value)
        self._line |= {"time": round(time.time(), 3), name: number if math.isfinite(number) else None}
        data = json.dumps(self._line).encode() + b"\n"
        self._file.seek(self._begin)
        self._file.write(data)
        self._file.truncate()


class MirroringWriter:
    """In the place of Megatron's TensorBoard writer: mirrors scalars, and hands everything on to it.

    Args:
        mirror: where scalars go too.
        writer: a SummaryWriter, or None.
    """

    def __init__(self, mirror: MetricsFile, writer: Any | None) -> None:
        self._mirror: MetricsFile | None = mirror
        self._writer = writer

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int, *rest: Any, **more: Any) -> None:
        if self._mirror is not None and not tag.endswith(_BY_SAMPLES):
            try:
                self._mirror.add(tag, scalar_value, global_step)
            except OSError as error:  # a full disk: training goes on
                print(
                    f"warning: {self._mirror.path} ends before step {global_step}: {error}", file=sys.stderr
                )
                self._mirror = None
        if self._writer is not None:
            self._writer.add_scalar(tag, scalar_value, global_step, *rest, **more)

    def __getattr__(self, name: str) -> Any:
        """add_text, add_figure, flush, close ...: TensorBoard's alone."""
        if self._writer is not None:
            return getattr(self._writer, name)
        if name.startswith("add_") or name in ("flush", "close"):
            return lambda *args, **settings: None
        raise AttributeError(f"a TensorBoard writer has no {name}")


def _lines_until(path: Path, step: int) -> tuple[list[bytes], int | None]:
    """-> (lines up to `step`, the last step of the others). A torn line, from a crash, is dropped too."""
    kept: list[bytes] = []
    dropped = None
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            found = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if found <= step and line.endswith(b"\n"):
            kept.append(line)
        elif found > step:
            dropped = found
    return kept, dropped
