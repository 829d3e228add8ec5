"""Lines of progress for a loop over batches. Imports nothing heavy."""

import time
from collections.abc import Callable

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Says now and then how far a loop has come, and about how long the rest of the loop will take."""

    def __init__(
        self, say: Callable[[str], None], total: int, noun: str, done: int = 0, prefix: str = ""
    ) -> None:
        """
        Args:
            say: gets the lines.
            total: number of items when the loop has ended.
            noun: what is counted, in the plural.
            done: number of items that were there before the loop.
            prefix: stands before each line.
        """
        self.say, self.total, self.noun, self.prefix = say, total, noun, prefix
        self.start = done
        self.begin = self.last = time.monotonic()

    def reached(self, done: int) -> None:
        """Say a line if the last line is ten seconds old and the loop has not ended."""
        now = time.monotonic()
        if now - self.last < _SECONDS_BETWEEN_LINES or done >= self.total:
            return
        self.last = now
        passed = now - self.begin
        left = passed * (self.total - done) / (done - self.start)
        self.say(f"{self.prefix}{done} of {self.total} {self.noun}, {passed:.0f} s, about {left:.0f} s left")
