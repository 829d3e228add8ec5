"""Helper processes that do not outlive the process that started them.

Nothing heavy is imported here, because a spawned helper process imports this module first.
"""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # an option of Linux' prctl


def end_with_parent() -> None:
    """Ask the kernel to end this process when its parent ends, however the parent ends (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
