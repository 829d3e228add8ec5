"""What Megatron's training loop calls to save and to load, and the writer of a checkpoint's files.

Megatron offers no hook for either, so functions of its modules are replaced.
"""

from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.managers import SyncManager
from typing import Any, Protocol

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.training import checkpointing, training, wandb_utils
from torch import multiprocessing


class SavingAndLoading(Protocol):
    """What takes the place of Megatron's functions; each method has the signature of Megatron's."""

    def save(self, iteration: int, *rest: Any, **named: Any) -> None:
        """Save, or begin to save, a checkpoint."""

    def load(self, *given: Any, **named: Any) -> Any:
        """Load a checkpoint -> its iteration and the number of floating-point operations so far."""

    def schedule(self, request: Any) -> None:
        """Start an asynchronous save (an AsyncRequest)."""

    def finalize(self, *given: Any, blocking: bool = False, **named: Any) -> None:
        """Finish the asynchronous saves that are done; wait for all of them if `blocking`."""


@dataclass
class MegatronSaving:
    """Megatron's own functions, as they were when this object was made."""

    save: Callable[..., None]
    load: Callable[..., Any]
    schedule: Callable[[Any], None]
    finalize: Callable[..., None]
    tell_wandb: Callable[[str, str, str, int], None]
    """Called with the paths of the checkpoint, its pointer and its folder, and the iteration."""

    @classmethod
    def found(cls) -> "MegatronSaving":
        """What stands in Megatron's modules now."""
        return cls(
            save=training.save_checkpoint,
            load=training.load_checkpoint,
            schedule=checkpointing.schedule_async_save,
            finalize=training.maybe_finalize_async_save,
            tell_wandb=wandb_utils.on_save_checkpoint_success,
        )


def replace_saving(ours: SavingAndLoading) -> None:
    """Let Megatron's training loop call `ours`. W&B is no longer told of a checkpoint: `ours` does that."""
    training.save_checkpoint, training.load_checkpoint = ours.save, ours.load
    checkpointing.schedule_async_save = ours.schedule
    training.maybe_finalize_async_save = ours.finalize
    wandb_utils.on_save_checkpoint_success = lambda *args: None


def name_write_failures(cause: Callable[[BaseException], str]) -> None:
    """Let Megatron's file writer say which file could not be written, and why.

    Megatron's writer returns its failure, and its caller keeps no more of a returned failure than the name of
    its type. Of a failure that is raised, the caller keeps the message.

    Args:
        cause: the words for the cause of a failure.
    """
    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data

    def write_preloaded_data(*args: Any, **named: Any) -> Any:
        found = write(*args, **named)
        if isinstance(found[1], Exception):
            path = named["write_bucket"][0]
            raise RuntimeError(f"{path} could not be written: {cause(found[1])}") from found[1]
        return found

    filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(write_preloaded_data)


def start_queue_process_with(initializer: Callable[[], None]) -> None:
    """Let the process that holds the queue of Megatron's write results begin with `initializer`.

    Args:
        initializer: a function of a module that imports little: the process is spawned and imports it.
    """

    def get_write_results_queue(mp_mode: str = "spawn") -> Any:
        if filesystem_async._results_queue is None:
            manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
            manager.start(initializer)
            filesystem_async._results_queue = manager.Queue()
        return filesystem_async._results_queue

    filesystem_async.get_write_results_queue = get_write_results_queue


def files_written(args: tuple[Any, ...]) -> list[str]:
    """The names of the files that an asynchronous save writes on this rank.

    Args:
        args: what Megatron calls an AsyncRequest's `async_fn` with: the rank, the files as (path, name,
            content), and the queue of results.
    """
    return [name for _, name, _ in args[1]]
