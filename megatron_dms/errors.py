"""The errors that a user meets. A message is one line: what was found, what was expected, the fix."""

from collections.abc import Sequence

_SHOWN = 3
_LONGEST = 120


def some(names: Sequence[object]) -> str:
    """Return the first few of many names, for a message of one line: "a, b, c and 5 more"."""
    shown = ", ".join(f"{name!s:.{_LONGEST}}" for name in names[:_SHOWN])
    return (shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")) or "none"


class CheckpointError(ValueError):
    """A checkpoint cannot be used."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # names out of a file may hold line ends


class DataError(ValueError):
    """Data cannot be trained on."""


class StartupError(ValueError):
    """A run cannot start, because of a mistake in its flags, its checkpoint or its data.

    one_rank: whether one rank alone meets the mistake, so that no other rank can report it.
    """

    def __init__(self, line: str, one_rank: bool = False) -> None:
        super().__init__(line)
        self.one_rank = one_rank
