"""The console command `megatron-dms`: one subcommand for each tool of this package.

    megatron-dms convert import --hf DIR --megatron DIR
    python -m megatron_dms.cli plan check              the same command, where no script is installed

The modules of this folder hold one subcommand each, with `main(argv=None) -> int`; the scripts in tools/ of a
clone call the same functions. A subcommand's module is imported only after it has been chosen.
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from megatron_dms.command_line import Parser

COMMANDS = {
    "convert": "convert checkpoints between Hugging Face and Megatron, and check that they agree",
    "preprocess": "turn chat or text JSONL into Megatron's token files with a loss mask",
    "evaluate": "measure accuracy against cost of exported checkpoints and of baselines",
    "plan": "predict memory, time and the best layout of a retrofit, and what can be served",
    "bench": "measure conversion, decoding, attention, losses and training steps on this machine",
    "preflight": "check every node before a job starts",
    "verify-resume": "kill and resume a training run, and compare it bit for bit with an uninterrupted one",
}
"""Name of each subcommand, and the line that `megatron-dms --help` shows for it."""


def main(argv: list[str] | None = None) -> int:
    """Run the subcommand that `argv` (default: sys.argv[1:]) names; the return value is the exit status."""
    words = sys.argv[1:] if argv is None else argv
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="megatron-dms",
        usage="megatron-dms [--help] [--version] COMMAND ...",
        description=f"Retrofit LLMs with a KV cache that forgets (DMS).\n\ncommands:\n{listing}",
        epilog="`megatron-dms COMMAND --help` shows the options of a command.",
        raw=True,
    )
    parser.add_argument("--version", action="version", version=f"megatron-dms {_version()}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands above")
    chosen = parser.parse_args(words[:1]).command
    module = import_module(f"megatron_dms.cli.{chosen.replace('-', '_')}")
    return module.main(words[1:])


def _version() -> str:
    try:
        return version("megatron-dms")
    except PackageNotFoundError:
        return "(not installed: runs from a clone)"
