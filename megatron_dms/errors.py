"""The one exception of this room."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: what was found, what was expected, and the fix, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # names out of a file may hold line ends
