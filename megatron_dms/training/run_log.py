"""The logs that span all jobs of a run: metrics.jsonl, and one W&B run.

metrics.jsonl holds every scalar that Megatron logs, one line for each training step, whether or not there are
other loggers:

    {"step": 7, "time": 1764000000.1, "learning-rate": 3e-05, "KL": 0.41, ..., "KL validation": 0.44}

A job that resumes from step S first drops the lines after S, so the file reads as if the run had never
stopped. A scalar is in the line of its step as soon as it is logged: the line is written anew. A value that
is not a finite number becomes null.

The id of the W&B run is kept beside the checkpoints. A job that resumes from a step before the last logged
step, as after a crash, rewinds the W&B run to the step from which it resumes.
"""

import json
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_dms.files import write_durably
from megatron_dms.upstream.megatron_loggers import wrap_tensorboard_writer

METRICS = "metrics.jsonl"
RUN_ID = "wandb_run_id"
_BY_SAMPLES = " vs samples"  # Megatron logs each scalar a second time over the number of samples, not steps


def open_run_log(args: Namespace, step: int) -> "MetricsFile | None":
    """Open metrics.jsonl and choose the W&B run, on the rank that logs. Call it before Megatron opens its
    loggers.

    Args:
        args: Megatron's checked arguments.
        step: the training step from which the run resumes; 0 for a new retrofit.

    Returns:
        The metrics file; None on the other ranks, and if no flag names a folder for it.

    Raises:
        OSError: a file cannot be written.
    """
    if args.rank != args.world_size - 1:
        return None
    folder = args.save or args.tensorboard_dir
    metrics = MetricsFile(Path(folder) / METRICS, step) if folder else None
    if args.wandb_project and args.save:
        _choose_wandb_run(args, step, rewind=metrics is not None and metrics.dropped is not None)
    return metrics


def mirror_metrics(metrics: "MetricsFile | None") -> None:
    """Mirror what Megatron logs into the metrics file. Call it after Megatron has opened its loggers."""
    if metrics is not None:
        wrap_tensorboard_writer(partial(MirroringWriter, metrics))


class MetricsFile:
    """metrics.jsonl, open for the lines after `step`.

    Attributes:
        dropped: the last step whose line was dropped, or None.

    Raises:
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.dropped = self._open(step)

    def _open(self, step: int) -> int | None:
        """Keep the lines up to `step`, and return the last step of the dropped lines (None if there are
        none)."""
        kept, dropped = _lines_until(self.path, step)
        write_durably(self.path, b"".join(kept).decode())
        self._file = self.path.open("r+b", buffering=0)
        # A later scalar may belong to the last line: a finished run that is started again validates at its
        # last step again.
        self._line: dict[str, Any] = json.loads(kept[-1]) if kept else {"step": -1}
        self._begin = sum(map(len, kept[:-1]))
        return dropped

    def add(self, name: str, value: float, step: int) -> None:
        """Put one scalar into the line of its step, which is the last line or a new one."""
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


def _lines_until(path: Path, step: int) -> tuple[list[bytes], int | None]:
    """Return the lines up to `step`, and the last step of the other lines. A line that a crash tore is
    dropped."""
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


class MirroringWriter:
    """A writer that takes the place of Megatron's TensorBoard writer, mirrors scalars, and hands everything
    on.

    Args:
        metrics: the file that receives the scalars, too.
        writer: Megatron's SummaryWriter, or None.
    """

    def __init__(self, metrics: MetricsFile, writer: Any | None) -> None:
        self._metrics: MetricsFile | None = metrics
        self._writer = writer

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int, *rest: Any, **more: Any) -> None:
        if self._metrics is not None and not tag.endswith(_BY_SAMPLES):
            try:
                self._metrics.add(tag, scalar_value, global_step)
            except OSError as error:  # a full disk: training goes on
                print(
                    f"warning: {self._metrics.path} ends before step {global_step}: {error}", file=sys.stderr
                )
                self._metrics = None
        if self._writer is not None:
            self._writer.add_scalar(tag, scalar_value, global_step, *rest, **more)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Hand the other methods (add_text, add_figure, flush, close ...) to TensorBoard alone."""
        if self._writer is not None:
            return getattr(self._writer, name)
        if name.startswith("add_") or name in ("flush", "close"):
            return lambda *args, **settings: None
        raise AttributeError(f"a TensorBoard writer has no {name}")


def _choose_wandb_run(args: Namespace, step: int, rewind: bool) -> None:
    """Choose the W&B run through environment variables, as Megatron passes no such argument to wandb.init().

    A variable that the user has set takes precedence.
    """
    from megatron_dms.formats.megatron_folder import TRACKER

    path = Path(args.save) / RUN_ID
    kept = path.read_text().strip() if path.is_file() else ""
    if step == 0 and (Path(args.save) / TRACKER).is_file():
        kept = ""  # a new retrofit beside another one's checkpoints: the W&B run of that one stays as it is
    run = os.environ.get("WANDB_RUN_ID") or kept or os.urandom(4).hex()
    if run != kept:
        write_durably(path, f"{run}\n")
    os.environ["WANDB_RUN_ID"] = run
    if step == 0 or "WANDB_RESUME" in os.environ or "WANDB_RESUME_FROM" in os.environ:
        return  # from step 0 the W&B run begins anew under its id, and its old points are dropped
    moment = f"{run}?_step={step}"
    if rewind and os.environ.get("WANDB_MODE") == "offline":
        os.environ["WANDB_RESUME_FROM"] = moment  # W&B keeps it with the run's data, and rewinds on the sync
        return
    if rewind:
        _rewind(args, moment)
    os.environ["WANDB_RESUME"] = "allow"


def _rewind(args: Namespace, moment: str) -> None:
    """Rewind the W&B run on its server.

    Rewinding is a preview of W&B's, which not every server has. Training goes on without it: the old points
    then stay, as W&B drops new points of a step that it has already.
    """
    import wandb

    try:
        wandb.init(
            project=args.wandb_project,
            entity=args.wandb_entity or None,
            dir=args.wandb_save_dir or str(Path(args.save) / "wandb"),
            resume_from=moment,
        ).finish()
    except wandb.Error as error:
        print(f"warning: W&B did not rewind to {moment}, its later points stay: {error}", file=sys.stderr)
