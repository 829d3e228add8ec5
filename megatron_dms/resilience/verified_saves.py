"""Saving and loading around Megatron's own: each save is read back before it counts, damage is found by name.

Megatron's training loop calls `Checkpoints` in the place of its own functions (upstream/megatron_saving.py).
Megatron's saving writes into a folder beside the checkpoints, its own pointer included: args.save names that
folder meanwhile. Then all ranks read back what is on the disk, each rank a share, and rank 0 gives the
checkpoint its checksums, its place and the pointer (run_folder.py). W&B is told last, because the checkpoint
must be in its place by then.
"""

import json
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.training import get_args, print_rank_0

from megatron_dms.conversion import CheckpointError, check_model_args
from megatron_dms.formats.checksums import (
    MANIFEST,
    FileSum,
    check_sizes,
    differences,
    digest,
    file_names,
    shares,
)
from megatron_dms.formats.megatron_folder import TRACKER, checkpoint_args
from megatron_dms.processes import end_with_parent
from megatron_dms.resilience import run_folder, save_worker
from megatron_dms.resilience.collective_steps import by_rank_0, ends_with_a_line, gathered, root_cause
from megatron_dms.resilience.ownership import Owner
from megatron_dms.resilience.watchdog import SAVE, Watchdog
from megatron_dms.upstream import megatron_distributed_optimizer, megatron_saving

RESUMES = "resuming from iteration {}"
_LAG = 30  # seconds for a network file system to show what another machine wrote
_NOT_SAVED = "iteration {} was not saved in {}, the checkpoints before it are as they were"


@dataclass(frozen=True)
class _Save:
    """One save under way."""

    iteration: int
    save: Path
    """The run's folder, where the checkpoint goes."""
    staging: Path
    """The folder beside the checkpoints that belongs to this save alone."""

    @property
    def folder(self) -> Path:
        """The folder that becomes the checkpoint."""
        return self.staging / run_folder.iteration_name(self.iteration)

    def note(self, rank: int) -> Path:
        """The file in which the worker of an asynchronous save leaves the checksums of its files."""
        return self.staging / f"checksums_of_rank_{rank}.json"


class Checkpoints:
    """What Megatron calls to save and to load.

    Args:
        keep: how many finished checkpoints stay when a new one is verified; 0 = all.
        resumes: whether the run goes on from --load, so that the checkpoint there must be verified.
        watchdog: told of each save.
        owner: on rank 0, what --save calls this run; another run may take the folder over. None: nothing is
            saved, or this is another rank.
    """

    def __init__(self, keep: int, resumes: bool, watchdog: Watchdog, owner: Owner | None = None) -> None:
        self.keep = keep
        self.resumes = resumes
        self._watchdog = watchdog
        self._owner = owner
        self._megatron = megatron_saving.MegatronSaving.found()
        self._saved_before = False
        self._under_way: _Save | None = None

    def install(self) -> None:
        """Take the place of Megatron's functions, and let its helper processes end with this one.

        The queue of Megatron's write results belongs to a process of its own, which a rank ended by kill -9
        would leave behind for ever.
        """
        megatron_saving.replace_saving(self)
        megatron_distributed_optimizer.mend()
        megatron_saving.name_write_failures(root_cause)
        megatron_saving.start_queue_process_with(end_with_parent)

    def save(self, iteration: int, *rest: Any, **named: Any) -> None:
        """Save as Megatron's `save_checkpoint` does; a failure is one line and ends the run."""
        args = get_args()
        said = args.save
        with self._watchdog.phase(SAVE), ends_with_a_line(_NOT_SAVED.format(iteration, said)):
            make = partial(self._new_staging, Path(said))
            self._under_way = _Save(iteration, Path(said), by_rank_0(make))
            self._saved_before = True
            try:
                args.save = str(self._under_way.staging)
                self._megatron.save(iteration, *rest, **named)
            finally:
                args.save = said
            if not args.async_save:
                self._finish(self._under_way)

    def schedule(self, request: Any) -> None:
        """Schedule as Megatron's `schedule_async_save` does; the worker also reads back what it wrote.

        All ranks do the rest once all workers are done, between two training steps.
        """
        save = self._under_way
        if save is None:
            raise RuntimeError("Megatron schedules an asynchronous save outside of save_checkpoint")
        note = save.note(dist.get_rank())
        if request.async_fn is not None:
            about = (megatron_saving.files_written, save.folder, note)
            write = partial(save_worker.write_and_digest, request.async_fn, *about)
            request = request._replace(async_fn=write)
        finalize = [*request.finalize_fns, partial(self._finish, save, note)]
        request.finalize_fns[:] = [partial(_guarded, save, step) for step in finalize]
        self._megatron.schedule(request)

    def finalize(self, *given: Any, blocking: bool = False, **named: Any) -> None:
        """Finalize as Megatron's `maybe_finalize_async_save` does, which waits for the save if `blocking`."""
        with self._watchdog.phase(SAVE) if blocking else nullcontext():
            self._megatron.finalize(*given, blocking=blocking, **named)

    def _finish(self, save: _Save, note: Path | None = None) -> None:
        """Verify the checkpoint, move it to its place, point to it and remove old ones. Collective."""
        begin = time.monotonic()
        sums = _union(gathered(lambda: _noted(note)))
        sizes = by_rank_0(
            lambda: {name: (save.folder / name).stat().st_size for name in file_names(save.folder)}
        )
        unread = {name: size for name, size in sizes.items() if name not in sums}
        sums |= _read_by_all(save.folder, unread, digest)
        removed = by_rank_0(partial(self._publish, save, sums))
        seconds = time.monotonic() - begin
        print_rank_0(
            f" iteration {save.iteration} verified: {len(sums)} files, {sum(sizes.values()) / 1e9:.3f} GB "
            f"read back in {seconds:.2f} s; it is now the newest checkpoint"
            + "".join(f"; iteration {old} removed" for old in removed)
        )
        if dist.get_rank() == dist.get_world_size() - 1:
            place = save.save / save.folder.name
            try:
                pointer = save.save / TRACKER
                self._megatron.tell_wandb(str(place), str(pointer), str(save.save), save.iteration)
            except Exception as error:  # W&B may have ended before the last save, or have no connection
                print(f"warning: W&B was not told of iteration {save.iteration}: {error}", file=sys.stderr)

    def _new_staging(self, save: Path) -> Path:
        self._check_owner()
        return run_folder.new_staging(save, clean=not self._saved_before)

    def _check_owner(self) -> None:
        if self._owner is not None:
            self._owner.check()

    def _publish(self, save: _Save, sums: dict[str, FileSum]) -> list[int]:
        self._check_owner()
        run_folder.finish(save.folder, save.save, save.iteration, sums)
        try:
            removed = run_folder.remove_old(save.save, self.keep, save.iteration, save.staging)
        except OSError as error:
            print(f"warning: an old checkpoint stays: {error}", file=sys.stderr)
            removed = []
        shutil.rmtree(save.staging, ignore_errors=True)
        return removed

    def load(self, *given: Any, **named: Any) -> Any:
        """Load as Megatron's `load_checkpoint` does, from a checkpoint whose every byte was read before."""
        args = get_args()
        if not self.resumes:
            return self._megatron.load(*given, **named)
        with ends_with_a_line("no checkpoint was loaded"):
            iteration = _verified(args)
        # The iteration is given, not left to the pointer: another node may still see an old pointer.
        asked, args.ckpt_step = args.ckpt_step, iteration
        try:
            return self._megatron.load(*given, **named)
        finally:
            args.ckpt_step = asked


def _guarded(save: _Save, step: Callable) -> None:
    with ends_with_a_line(_NOT_SAVED.format(save.iteration, save.save)):
        step()


def _noted(note: Path | None) -> dict[str, FileSum]:
    """The checksums that the worker of an asynchronous save left; none if there was no worker."""
    if note is None or not note.is_file():
        return {}
    return {name: FileSum(**values) for name, values in json.loads(note.read_text()).items()}


def _verified(args: Namespace) -> int:
    """Find the iteration to go on from, every file read; set damaged checkpoints aside. Collective."""
    save, asked = Path(args.load), args.ckpt_step
    damaged: dict[int, str] = {}
    while True:
        iteration, passed = by_rank_0(partial(_look, save, damaged)) if asked is None else (asked, {})
        problem = _damage(save / run_folder.iteration_name(iteration))
        if problem is None:
            break
        if asked is not None:
            raise CheckpointError(f"--ckpt-step {asked}: {problem}; name another, or leave it out")
        damaged[iteration] = problem
    if passed:
        by_rank_0(partial(_heal, save, iteration, passed))
        by_rank_0(partial(_check_described, args, save, iteration))
    print_rank_0(f" {RESUMES.format(iteration)} of {save}")
    return iteration


def _look(save: Path, damaged: dict[int, str]) -> tuple[Any, dict[int, str]]:
    """The resume point of run_folder.py. A checkpoint with a file that is missing or too short is looked at
    twice: a network file system may take a while to show what another machine wrote."""
    found = run_folder.resume_point(save, damaged)
    if found[1].keys() - damaged.keys():
        time.sleep(_LAG)
        found = run_folder.resume_point(save, damaged)
    return found


def _heal(save: Path, iteration: int, passed: dict[int, str]) -> None:
    for number, reason in passed.items():
        aside = run_folder.set_aside(save, number) if number >= 0 else None
        moved = f"; set aside as {aside.name}" if aside else ""
        print(f" damaged checkpoint: {reason}{moved}; using iteration {iteration} instead", flush=True)
    run_folder.point_to(save, iteration)


def _check_described(args: Namespace, save: Path, iteration: int) -> None:
    """Check that iteration `iteration` describes the model that the damaged checkpoint described: the run's
    arguments were read from the damaged one.

    Raises:
        CheckpointError: the two describe different models.
    """
    try:
        check_model_args(args, checkpoint_args(save, iteration))
    except CheckpointError as error:
        raise CheckpointError(
            f"the damaged checkpoint described another model than iteration {iteration} of {save} does: "
            "start the same command again"
        ) from error


def _damage(folder: Path) -> str | None:
    """Say what is wrong with a finished checkpoint; None: nothing. Each rank reads a part. Collective.

    Raises:
        CheckpointError: a rank reads other bytes than rank 0: its node must be mended, not the checkpoint.
    """

    def read() -> dict[str, FileSum] | str | None:
        if not (folder / MANIFEST).is_file():
            return None
        try:
            return check_sizes(folder)
        except CheckpointError as error:
            return str(error)

    expected = by_rank_0(read)
    if expected is None:
        print_rank_0(
            f" {folder} has no {MANIFEST} (an earlier version saved it): its content is not verified"
        )
        return None
    if isinstance(expected, str):
        return expected
    begin = time.monotonic()
    found = _read_by_all(folder, {name: entry.bytes for name, entry in expected.items()}, _digest_or_reason)
    wrong = differences(folder, found, expected)
    if not wrong:
        seconds = time.monotonic() - begin
        print_rank_0(f" {folder} verified: {len(found)} files, as they were saved, in {seconds:.2f} s")
        return None
    first = next(iter(wrong))
    again = by_rank_0(lambda: _digest_or_reason(folder / first))
    if again == expected[first]:
        raise CheckpointError(
            f"{wrong[first]}, but rank 0 reads what was saved: look at the memory and the file system of the "
            "other nodes"
        )
    more = f" (and {len(wrong) - 1} more files)" if len(wrong) > 1 else ""
    return wrong[first] + more


def _digest_or_reason(path: Path) -> FileSum | str:
    """The checksum of a file, or the reason why the file cannot be read."""
    try:
        return digest(path)
    except OSError as error:
        return str(error.strerror)


def _read_by_all[T](folder: Path, sizes: dict[str, int], read: Callable[[Path], T]) -> dict[str, T]:
    """What `read` returns for each of these files, each read by one rank. Collective."""
    mine: Sequence[str] = shares(sizes, dist.get_world_size())[dist.get_rank()]
    return _union(gathered(lambda: {name: read(folder / name) for name in mine}))


def _union[T](parts: Sequence[dict[str, T]]) -> dict[str, T]:
    return {name: found for part in parts for name, found in part.items()}
