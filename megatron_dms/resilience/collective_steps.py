"""Steps that all ranks take together: a failure of one rank ends all of them, and in time."""

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
    """Another rank failed, and that rank says why."""


def by_rank_0[T](work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and return its result on every rank. Collective.

    Raises:
        OSError, CheckpointError: `work` failed; raised on rank 0.
        FailedElsewhere: `work` failed; raised on the other ranks.
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
    """Do `work` on every rank and return all results, by rank, on every rank. Collective.

    Raises:
        OSError, CheckpointError: `work` failed on this rank.
        FailedElsewhere: `work` failed on other ranks only.
    """
    failure: Exception | None = None
    mine: tuple[T | None, bool] = (None, False)
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
    """Turn any failure within into exit status 1, and one line on stderr from each rank that knows the cause.

    Args:
        what: what did not happen.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:  # CheckpointException derives from BaseException
        told = FailedElsewhere, CheckpointException  # rank 0 alone gets the failures of a CheckpointException
        if isinstance(error, told) and not getattr(error, "failures", None):
            time.sleep(_LET_SPEAK)
        else:
            line = f"pretrain_dms.py: error: rank {dist.get_rank()}: {what}: {root_cause(error)}"
            print(" ".join(line.split()), file=sys.stderr, flush=True)
        raise SystemExit(1) from error


def root_cause(error: BaseException) -> str:
    """The words of the exception at the bottom: the operating system's if there are any."""
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
