"""Loggers that outlive a job: the mirror of all metrics, and one W&B run for all jobs of a retrofit.

The id of the W&B run is kept beside the checkpoints. A job that resumes from a step before the last logged
one, as after a crash, rewinds the run to that step.
"""

import os
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

from megatron_dms.files import write_durably
from megatron_dms.training.metrics_file import NAME, MetricsFile, MirroringWriter
from megatron_dms.upstream.megatron_loggers import wrap_tensorboard_writer

RUN_ID = "wandb_run_id"


def open_run_log(args: Namespace, step: int) -> MetricsFile | None:
    """Before Megatron opens its loggers: the mirror, and which W&B run it is, on the rank that logs.

    Args:
        args: Megatron's, checked.
        step: training steps behind the checkpoint that is resumed; 0: a new retrofit.

    Returns:
        The mirror; None on other ranks, and where there is no folder for it.

    Raises:
        OSError: a file cannot be written.
    """
    if args.rank != args.world_size - 1:
        return None
    folder = args.save or args.tensorboard_dir
    mirror = MetricsFile(Path(folder) / NAME, step) if folder else None
    if args.wandb_project and args.save:
        _choose_wandb_run(args, step, rewind=mirror is not None and mirror.dropped is not None)
    return mirror


def mirror_metrics(mirror: MetricsFile | None) -> None:
    """After Megatron has opened its loggers: put the mirror before its TensorBoard writer, if any."""
    if mirror is not None:
        wrap_tensorboard_writer(partial(MirroringWriter, mirror))


def _choose_wandb_run(args: Namespace, step: int, rewind: bool) -> None:
    """Say by environment, Megatron's wandb.init() has no such argument, which run to open; what the user has
    set there counts more."""
    from megatron_dms.formats.megatron_folder import TRACKER

    path = Path(args.save) / RUN_ID
    kept = path.read_text().strip() if path.is_file() else ""
    if step == 0 and (Path(args.save) / TRACKER).is_file():
        kept = ""  # a new retrofit beside the checkpoints of another: that one's run stays what it is
    run = os.environ.get("WANDB_RUN_ID") or kept or os.urandom(4).hex()
    if run != kept:
        write_durably(path, f"{run}\n")
    os.environ["WANDB_RUN_ID"] = run
    if step == 0 or "WANDB_RESUME" in os.environ or "WANDB_RESUME_FROM" in os.environ:
        return  # from step 0 the run begins anew under its id, its old points dropped
    moment = f"{run}?_step={step}"
    if rewind and os.environ.get("WANDB_MODE") == "offline":
        os.environ["WANDB_RESUME_FROM"] = moment  # kept with the run's data, done when it is synced
        return
    if rewind:
        _rewind(args, moment)
    os.environ["WANDB_RESUME"] = "allow"


def _rewind(args: Namespace, moment: str) -> None:
    """Rewind the run on its server. Not every server can (W&B calls it a preview), and a training does not
    end for that: its old points stay, as W&B drops new points of steps that it has."""
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
