"""Finished checkpoints of a run, small and made by hand."""

import shutil
from argparse import Namespace
from pathlib import Path

import torch

from megatron_dms.formats import checksums
from megatron_dms.formats.checksums import digest, file_names
from megatron_dms.formats.torch_dist import Chunk, write
from megatron_dms.resilience import run_folder
from megatron_dms.resilience.run_folder import iteration_name

DATA = "__0_0.distcp"


def staged(save: Path, iteration: int, value: float = 0.5) -> Path:
    """Write a checkpoint beside its place; it has not been read back yet."""
    folder = run_folder.new_staging(save, clean=False) / iteration_name(iteration)
    folder.mkdir()
    tensor = torch.full((4, 3), value)
    write(folder, [Chunk("w", (4, 3), torch.float32, lambda: [tensor])], [], {"args": Namespace()})
    return folder


def sums(folder: Path) -> dict[str, checksums.FileSum]:
    """Return the checksums of the files of a checkpoint."""
    return {name: digest(folder / name) for name in file_names(folder)}


def save_one(save: Path, iteration: int, keep: int = 0, value: float = 0.5) -> None:
    """Go through all steps of a save, in their order."""
    folder = staged(save, iteration, value)
    run_folder.finish(folder, save, iteration, sums(folder))
    run_folder.remove_old(save, keep, iteration, folder.parent)
    shutil.rmtree(folder.parent)
