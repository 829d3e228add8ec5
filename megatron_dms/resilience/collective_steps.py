"""Work that one rank does for all, or each for itself, so that a failure of one ends all of them in time."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_dms.conversion import CheckpointError

_LET_SPEAK = 20  # seconds at most: torchrun ends the wait once the rank that speaks has ended
_FAILURES = (OSError, CheckpointError)


class FailedElsewhere(Exception):
    """Another rank failed, and says why."""


def by_rank_0[T](work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, for all; its failure (OSError, CheckpointError) is raised there, and
    FailedElsewhere on the others. Collective.
    """
    found: list = [None, False]
    failure = None
    if dist.get_rank() == 0:
        try:
            found = [work(), False]
        except _FAILURES as error:
            failure, found = error, [None, True]
    dist.broadcast_object_list(found, src=0)
    if failure is not None:
        raise failure
    if found[1]:
        raise FailedElsewhere
    return found[0]


def gathered[T](work: Callable[[], T]) -> list[T]:
    """What `work` returns on each rank, on all ranks; failures as in by_rank_0. Collective."""
    failure, mine = None, (None, False)
    try:
        mine = (work(), False)
    except _FAILURES as error:
        failure, mine = error, (None, True)
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    if failure is not None:
        raise failure
    if any(failed for _, failed in parts):
        raise FailedElsewhere
    return [part for part, _ in parts]


@contextmanager
def ends_with_a_line(what: str) -> Iterator[None]:
    """Any failure within becomes one line on stderr, from the ranks that know the cause, and exit status 1.

    what: what did not happen.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        told = FailedElsewhere, CheckpointException  # of the latter, rank 0 alone gets the failures
        if isinstance(error, told) and not getattr(error, "failures", None):
            time.sleep(_LET_SPEAK)
        else:
            line = f"pretrain_dms.py: error: rank {dist.get_rank()}: {what}: {root_cause(error)}"
            print(" ".join(line.split()), file=sys.stderr, flush=True)
        raise SystemExit(1) from error


def root_cause(error: BaseException) -> str:
    """What lies at the bottom of an exception: the operating system's word if there is one."""
    if isinstance(error, CheckpointException):
        failures = {rank: root_cause(inner) for rank, (inner, _) in error.failures.items()}
        # Megatron puts "Worker failure: An error is caught while starting worker 0, error: " before it.
        return "; ".join(f"rank {rank}: {text.rpartition(' error: ')[2]}" for rank, text in failures.items())
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, OSError):
            return str(below)
        below = below.__cause__ or below.__context__
    return f"{type(error).__name__}: {error}"
