"""The one exception of this room."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: what was found, what was expected, and the fix, in one line."""
