"""The error of one line of input, and the check of a text."""

from typing import Any


class LineError(ValueError):
    """A line that cannot be encoded; the message says what was found, what was expected and the fix."""


def require_text(value: Any, name: str) -> None:
    """Check that a value is a text that a tokenizer takes.

    Raises:
        LineError: the value is no string, or holds half a surrogate pair.
    """
    if not isinstance(value, str):
        raise LineError(f"{name}: found {type(value).__name__}, expected a string; mend or delete the line")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may spell half a surrogate pair, which no tokenizer takes
        raise LineError(
            f"{name}: found half a surrogate pair, expected Unicode text; mend the line"
        ) from error
