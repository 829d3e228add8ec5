"""What the tools' command lines share: errors of one line, and lines on stderr. Imports nothing heavy."""

import argparse
import sys
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


def require_positive(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """Refuse the first of these options that is not above 0."""
    for name in names:
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected > 0")


def say(line: str) -> None:
    """A line on stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def say_error(error: Exception) -> int:
    """The one line of an error; returns the exit status that goes with it."""
    say(f"error: {' '.join(str(error).split())}")
    return 2
