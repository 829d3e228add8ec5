"""Which checkpoints of a run are finished, and how a checkpoint becomes finished. No process group is needed.

A checkpoint is written into a folder `unfinished-*` beside the finished ones, verified, given its checksums,
moved to its place, and then named by the pointer (`latest_checkpointed_iteration.txt`): it is finished when
the pointer names it. So the pointer decides, also if somebody set it back by hand. Only if the pointer or the
checkpoint that it names is damaged does the newest checkpoint before take its place. Each step is one
rename, on disk before the next.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from megatron_dms.errors import CheckpointError
from megatron_dms.files import sync_folder, take_place, write_durably
from megatron_dms.formats.checksums import MANIFEST, FileSum, check_sizes, write_manifest
from megatron_dms.formats.megatron_folder import RELEASE, TRACKER
from megatron_dms.formats.torch_dist import Reader

UNFINISHED = "unfinished-"
_ITERATION = "iter_"


def iteration_name(iteration: int) -> str:
    """Megatron's name for the folder of an iteration."""
    return f"{_ITERATION}{iteration:07d}"


def resume_point(
    save: Path, damaged: Mapping[int, str] | None = None
) -> tuple[int | str | None, dict[int, str]]:
    """Find the checkpoint that a run in `save` goes on from, by names and sizes only; change nothing.

    Args:
        damaged: iterations that are known to be damaged, and why.

    Returns:
        The iteration (RELEASE after an import, None if none was ever finished), and the reasons why newer
        ones were passed over, by iteration (-1: the pointer itself).

    Raises:
        CheckpointError: a checkpoint was finished here, but none is left that can be used.
    """
    passed: dict[int, str] = {}
    pointer = save / TRACKER
    said = pointer.read_text(errors="replace").strip() if pointer.is_file() else None
    older = sorted(finished_iterations(save), reverse=True)
    if said == RELEASE:
        return RELEASE, passed
    if said is None and not older:
        return None, passed
    if said is not None and said.isdecimal():
        newest = int(said)
        older = [newest, *(iteration for iteration in older if iteration < newest)]
    else:
        what = "is missing" if said is None else f"says {said[:80]!r}, expected a number"
        passed[-1] = f"{pointer} {what}"
    for iteration in older:
        problem = (damaged or {}).get(iteration) or _problem(save / iteration_name(iteration))
        if not problem:
            return iteration, passed
        passed[iteration] = problem
    raise CheckpointError(
        f"no checkpoint left to go on from in {save}: {'; '.join(passed.values())}; mend it, or move the "
        "folder away to start anew"
    )


def _problem(folder: Path) -> str | None:
    """Say what is wrong with a finished checkpoint, as far as names and sizes tell; None: nothing."""
    try:
        if not folder.is_dir():
            return f"{folder} is missing"
        if (folder / MANIFEST).is_file():
            check_sizes(folder)
        else:
            Reader(folder)  # saved by an earlier version, without checksums
    except CheckpointError as error:
        return str(error)
    return None


def finished_iterations(save: Path) -> list[int]:
    """The iterations that have checksums, in no order."""
    folders = (path.parent for path in save.glob(f"{_ITERATION}*/{MANIFEST}"))
    names = (folder.name.removeprefix(_ITERATION) for folder in folders)
    return [int(name) for name in names if name.isdecimal()]


def point_to(save: Path, iteration: int) -> None:
    """Let the pointer name this iteration as the newest finished one."""
    write_durably(save / TRACKER, str(iteration))


def new_staging(save: Path, clean: bool) -> Path:
    """Make a folder to write one checkpoint into.

    The name is new each time: a process of a killed run that still writes cannot touch this run's files.

    Args:
        clean: remove the folders that killed runs left.
    """
    save.mkdir(parents=True, exist_ok=True)
    for left in save.glob(f"{UNFINISHED}*") if clean else ():
        shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=save))


def finish(staged: Path, save: Path, iteration: int, sums: Mapping[str, FileSum]) -> None:
    """Make a checkpoint that was written and read back the newest finished one.

    Args:
        staged: the checkpoint's folder within its staging folder.
        sums: the checksums of its files, by name.

    Raises:
        CheckpointError: the checkpoint's files do not fit together.
        OSError: the disk is full or gone.
    """
    Reader(staged)  # every tensor has its place in a file that is long enough
    write_manifest(staged, sums)
    take_place(staged, save / staged.name)  # an abandoned course of the run may have left one there
    sync_folder(save)
    point_to(save, iteration)


def set_aside(save: Path, iteration: int) -> Path | None:
    """Rename a damaged checkpoint, so that it is neither taken for a good one nor overwritten.

    Returns:
        The new path; None if there is no folder to rename.
    """
    folder = save / iteration_name(iteration)
    if not folder.is_dir():
        return None
    number, aside = 1, save / f"damaged_{folder.name}"
    while aside.exists():
        number += 1
        aside = save / f"damaged_{folder.name}_{number}"
    folder.rename(aside)
    sync_folder(save)
    return aside


def remove_old(save: Path, keep: int, newest: int, staging: Path) -> list[int]:
    """Remove finished checkpoints before `newest`, which was just verified, until `keep` are left in all.

    Each checkpoint first leaves its place in one rename, so that a half-removed one is never taken for a
    finished one.

    Args:
        keep: how many finished checkpoints stay, `newest` among them; 0 = all.
        staging: the folder into which they are moved to be removed.

    Returns:
        The iterations that were removed.
    """
    old = sorted(iteration for iteration in finished_iterations(save) if iteration < newest)
    old = old[: max(0, len(old) - (keep - 1))] if keep else []
    for iteration in old:
        gone = staging / f"removed_{iteration_name(iteration)}"
        (save / iteration_name(iteration)).rename(gone)
        sync_folder(save)
        shutil.rmtree(gone, ignore_errors=True)
    return old
