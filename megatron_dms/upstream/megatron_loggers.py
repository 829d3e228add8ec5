"""The TensorBoard writer that Megatron's training loop asks for at each step."""

from collections.abc import Callable
from typing import Any


def wrap_tensorboard_writer(wrap: Callable[[Any], Any]) -> None:
    """Put another writer in the place of Megatron's.

    Megatron has a getter for its writer and no setter, and asks the getter at each step.

    Args:
        wrap: called with Megatron's SummaryWriter, or None on a rank without one; returns the writer that
            takes its place.
    """
    from megatron.training import global_vars

    global_vars._GLOBAL_TENSORBOARD_WRITER = wrap(global_vars.get_tensorboard_writer())
