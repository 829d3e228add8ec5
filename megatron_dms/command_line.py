"""What the tools' command lines share: errors of one line, and lines on stderr. Imports nothing heavy."""

import argparse
import sys
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line `error: ...`; exit status 2. An abbreviated option is an unknown one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str) -> NoReturn:
        say(f"error: {message} (see {self.prog} --help)")
        sys.exit(2)


def split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    """A tool's own options, and what comes after `--`: another program's command line."""
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
