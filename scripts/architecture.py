#!/usr/bin/env python
"""Make the drawing of rooms and the tree of files in docs/architecture.md from the source.

    python scripts/architecture.py            print what the page should hold
    python scripts/architecture.py --write    put it into the page

The drawing has an arrow for each room of megatron_dms that imports another room. The tree gives each module
with the first sentence of its docstring. tests/unit/test_architecture.py fails if the page is older than the
source.
"""

import ast
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = ROOT / "megatron_dms"
WIDTH = 110
_BEGIN, _END = "<!-- {}: made by scripts/architecture.py -->", "<!-- end of {} -->"


def modules() -> list[Path]:
    """Every module of the package, rooms after the files beside them."""
    found = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return sorted(found, key=lambda path: [(part.suffix != ".py", part.name) for part in _parts(path)])


def _parts(path: Path) -> list[Path]:
    return [Path(part) for part in path.relative_to(PACKAGE).parts]


def room_of(path: Path) -> str:
    """The folder of a module directly below the package; "megatron_dms" for a module beside the rooms."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else "megatron_dms"


def summary(path: Path) -> str:
    """The first sentence of a module's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(docstring.split("\n\n")[0].split())
    return first.split(". ")[0].removesuffix(".")


def imports_of(path: Path) -> set[str]:
    """The rooms that a module imports, wherever in the module, its own room left out."""
    rooms = {entry.name for entry in PACKAGE.iterdir() if (entry / "__init__.py").exists()}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    named = {parts[1] for name in found if len(parts := name.split(".")) > 1 and parts[0] == "megatron_dms"}
    return (named & rooms) - {room_of(path)}


def arrows() -> dict[str, set[str]]:
    """For each room the rooms that it imports."""
    found: dict[str, set[str]] = {}
    for path in modules():
        found.setdefault(room_of(path), set()).update(imports_of(path))
    found.pop("megatron_dms", None)
    return dict(sorted(found.items()))


def drawing() -> str:
    """The rooms and their imports as a Mermaid flow chart."""
    lines = [f"    {room} --> {' & '.join(sorted(used))}" for room, used in arrows().items() if used]
    return "\n".join(["```mermaid", "flowchart LR", *lines, "```"])


def tree() -> str:
    """Every module with its summary, indented by folder."""
    lines, above = ["megatron_dms/"], ()
    for path in modules():
        folders = path.relative_to(PACKAGE).parts[:-1]
        for depth in range(len(folders)):
            if folders[: depth + 1] != above[: depth + 1]:
                name = "  " * (depth + 1) + folders[depth] + "/"
                lines += _entry(name, summary(PACKAGE.joinpath(*folders[: depth + 1], "__init__.py")))
        above = folders
        lines += _entry("  " * (len(folders) + 1) + path.name, summary(path))
    return "\n".join(["```", *lines, "```"])


def _entry(name: str, text: str) -> list[str]:
    return [f"{name:<30}  {textwrap.shorten(text, WIDTH - 32, placeholder=' …')}".rstrip()]


def page() -> str:
    """The page as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    for name, block in (("rooms", drawing()), ("tree", tree())):
        begin, end = _BEGIN.format(name), _END.format(name)
        before, rest = text.split(begin, 1)
        text = f"{before}{begin}\n{block}\n{end}{rest.split(end, 1)[1]}"
    return text


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())
