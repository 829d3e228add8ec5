"""Helper processes that do not outlive their rank. Imports nothing heavy: a spawned helper reads it first."""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # of Linux' prctl


def end_with_parent() -> None:
    """Ask the kernel to end this process when its parent ends, however that ends (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
