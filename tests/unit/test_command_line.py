"""The console command `megatron-dms` and its subcommands: what they list, import and refuse."""

import pytest

from megatron_dms.cli import COMMANDS, main
from tests.support.tools import ROOT, run_python, run_tool

_HEAVY = {"torch", "transformers", "megatron", "matplotlib"}
_HELP = """
import sys
from megatron_dms.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code, stop.code
print("\\nimported:", *{name.partition(".")[0] for name in sys.modules})
"""


def _ask(*words: str) -> tuple[str, set[str]]:
    """What a command prints, and the packages that its process has imported."""
    done = run_python("-c", _HELP, *words)
    assert done.status == 0, done.error
    text, _, imported = done.out.rpartition("\nimported:")
    return text, set(imported.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_torch(name: str) -> None:
    """Catches: a subcommand that imports a library of seconds before it knows what is asked."""
    text, imported = _ask(name, "--help")
    assert text.startswith(f"usage: megatron-dms {name} ") and f"    megatron-dms {name} " in text
    assert not _HEAVY & imported


def test_the_command_lists_its_subcommands() -> None:
    """Catches: a subcommand without its line, a module of a subcommand that is imported unasked."""
    text, imported = _ask("--help")
    lines = text.splitlines()
    for name, what in COMMANDS.items():
        assert any(line.split() == [name, *what.split()] for line in lines), name
    assert not _HEAVY & imported


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND (see megatron-dms --help)"),
        (["exprot"], "'exprot' (choose from 'convert', "),
        (["convert", "exprot"], "'exprot' (choose from 'import', "),
        (["convert", "import"], "--hf, --megatron (see megatron-dms convert import --help)"),
        (["plan", "check", "--memory-eff", "1"], "unrecognized arguments: --memory-eff 1"),
    ],
)
def test_bad_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line of error, exit status 2, nothing on stdout."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capsys.readouterr()
    assert stop.value.code == 2 and not said.out
    (line,) = said.err.splitlines()
    assert line.startswith("error: ") and message in line


def test_every_subcommand_has_its_script() -> None:
    """Catches: a subcommand that a clone has no script for, or a script that says another name."""
    scripts = {path.stem for path in ROOT.glob("tools/*.py")}
    assert scripts == {name.replace("-", "_") for name in COMMANDS if name != "preprocess"} | {
        "preprocess_data"
    }
    for script in scripts:
        done = run_tool(f"tools/{script}.py", "--help", process=True)
        assert done.status == 0 and done.out.startswith(f"usage: tools/{script}.py "), done.error
