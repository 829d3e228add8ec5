"""What the command lines share: one-line errors, types of numbers, lines on stderr. Imports nothing heavy."""

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line `error: ...` and exits with status 2.

    An abbreviated option is an unknown one. raw: keep the lines of the description as they are.
    """

    def __init__(self, *args: Any, raw: bool = False, **kwargs: Any) -> None:
        form = {"formatter_class": argparse.RawDescriptionHelpFormatter} if raw else {}
        super().__init__(*args, **{"allow_abbrev": False} | form | kwargs)

    def error(self, message: str) -> NoReturn:
        say(f"error: {message} (see {self.prog} --help)")
        sys.exit(2)


def tool_parser(description: str | None, written: str, program: str) -> Parser:
    """The parser of one tool.

    Args:
        description: the docstring of the tool's module.
        written: what the docstring calls the program, such as "megatron-dms convert".
        program: what is run, and what the help says instead, such as "tools/convert.py".
    """
    return Parser(prog=program, description=(description or "").replace(written, program), raw=True)


def split_at_dashes(argv: list[str] | None) -> tuple[list[str], list[str]]:
    """Split a command line (None: sys.argv[1:]) at `--`: the tool's own options, another program's line."""
    words = sys.argv[1:] if argv is None else argv
    split = words.index("--") if "--" in words else len(words)
    return words[:split], words[split + 1 :]


def count(text: str) -> int:
    """Parse a whole number above 0, as the `type` of an option (like all functions from here to `seed`).

    Raises:
        argparse.ArgumentTypeError: the text is anything else.
    """
    if not text.isdecimal() or not 0 < int(text) < 2**40:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def whole(text: str) -> int:
    """Parse a whole number, 0 or more."""
    return 0 if text == "0" else count(text)


def not_negative(text: str) -> float:
    """Parse a finite number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 on")
    return value


def positive(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        value = not_negative(text)
    except argparse.ArgumentTypeError:
        value = 0.0
    if not value:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value


def at_least_one(text: str) -> float:
    """Parse a finite number, 1 or more, such as a compression ratio."""
    if (value := positive(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def share(text: str) -> float:
    """Parse a number above 0 and at most 1."""
    return _at_most_one(text, positive(text))


def share_or_none(text: str) -> float:
    """Parse a number from 0 to 1."""
    return _at_most_one(text, not_negative(text))


def _at_most_one(text: str, value: float) -> float:
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is above 1")
    return value


def seed(text: str) -> int:
    """Parse a seed of torch's generators: a whole number from 0 to 2^63 - 1."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 to 2^63 - 1")
    return int(text)


def say(line: str) -> None:
    """Print a line on stderr, and flush it."""
    print(line, file=sys.stderr, flush=True)


def say_error(error: Exception) -> int:
    """Print an error in one line on stderr; return the exit status of bad input."""
    say(f"error: {' '.join(str(error).split())}")
    return 2


def exit_status(work: Callable[[], int | None], kept: str = "nothing was left behind") -> int:
    """Run the work of a tool and return the exit status: the work's own (None: 0), 2 for bad input, 130 for
    Ctrl-C.

    kept: what Ctrl-C leaves of the work, for the line that is printed then.
    """
    try:
        return work() or 0
    except (ValueError, OSError) as error:  # CheckpointError is a ValueError
        return say_error(error)
    except KeyboardInterrupt:
        say(f"interrupted; {kept}")
        return 130
