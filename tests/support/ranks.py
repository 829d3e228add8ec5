"""Processes that play the ranks of a small gloo group."""

from collections.abc import Callable

import torch


def run_ranks(function: Callable[[int, str], None], folder: str, processes: int) -> None:
    """Call function(rank, folder) in each of `processes` processes, and wait for their end.

    The processes are forked, so they have imported what the test has imported. An error in one ends the
    others, and is raised here.
    """
    torch.multiprocessing.start_processes(function, (folder,), nprocs=processes, start_method="fork")
