"""The page of real messages: each message that it quotes is one that the source can print."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
_QUOTED = re.compile(r"^\*\*`([^`]+)`", re.MULTILINE)
_PLACEHOLDER = "…"


def text_of(node: ast.AST) -> str | None:
    """A string or an f-string of the source, its values as placeholders; None for any other node."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or _PLACEHOLDER for part in node.values)
    return None


@cache
def strings_of_the_source() -> str:
    """Every string of the package and of the launchers, one a line."""
    found = []
    for path in [*ROOT.glob("megatron_dms/**/*.py"), *ROOT.glob("tools/*.py"), ROOT / "pretrain_dms.py"]:
        found += [text for node in ast.walk(ast.parse(path.read_text())) if (text := text_of(node))]
    found += [path.read_text() for path in (ROOT / "launch").iterdir()]
    return "\n".join(found)


def unknown_parts(message: str) -> list[str]:
    """The parts of a quoted message, between its placeholders, that no string of the source holds."""
    parts = [part.strip() for part in message.split(_PLACEHOLDER)]
    return [part for part in parts if part not in strings_of_the_source()]


MESSAGES = _QUOTED.findall(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_stands_in_the_source(message: str) -> None:
    """Catches: a message that was reworded since, which a reader would search for in vain."""
    assert not unknown_parts(message)


def test_the_page_quotes_messages() -> None:
    """Catches: a page whose messages the pattern above no longer finds, and a check that accepts anything."""
    assert len(MESSAGES) >= 15
    assert unknown_parts("no checkpoint to start from: … never said …") == ["never said"]
