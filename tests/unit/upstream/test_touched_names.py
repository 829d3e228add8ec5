"""What we rely on in Megatron, modelopt, transformers and torch is there, and is listed.

Names and parameters are read from the libraries' source; only torch is imported, for operators that are
defined in C++.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest

from megatron_dms.upstream import CHECKED_VERSIONS
from tests.support.touched_names import BOUND, FIELDS, RELIED_ON, SOURCE, TOUCHES, Touch

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "megatron_dms"
LIBRARIES = ("megatron", "modelopt", "torch", "transformers")


@cache
def tree_of(module: str) -> ast.Module:
    """The parsed source, or else the stub, of one of their modules, which is not imported."""
    return ast.parse(source_of(module))


@cache
def source_of(module: str) -> str:
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    assert spec is not None and spec.submodule_search_locations is not None, f"{top} is not installed"
    for place in spec.submodule_search_locations:
        stem = Path(place, *rest)
        for path in (stem.with_suffix(".py"), stem / "__init__.py", stem / "__init__.pyi"):
            if path.is_file():
                return path.read_text(encoding="utf-8")
    raise AssertionError(f"{module} is gone")


def bindings(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What a module or a class binds at its top level, under `if` and `try` too."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name): node for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
            found |= {name.id: node for name in names if isinstance(name.ctx, ast.Store)}
        elif isinstance(node, ast.If | ast.Try | ast.With):
            found |= bindings([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])
    return found


def definition(theirs: str) -> ast.stmt:
    """The statement that binds MODULE:NAME, in the module or in one that it imports everything of."""
    module, _, name = theirs.partition(":")
    top = bindings(tree_of(module).body)
    if "*" in top and name.partition(".")[0] not in top:
        stars = [
            node
            for node in tree_of(module).body
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
        ]
        for other in (f"{module}.{node.module}" if node.level else str(node.module) for node in stars):
            top |= bindings(tree_of(other).body)
    first, *rest = name.split(".")
    assert first in top, f"{module} has no {name}"
    found = top[first]
    for part in rest:
        inside = bindings(found.body) if isinstance(found, ast.ClassDef) else {}
        assert part in inside, f"{module} has no {name}"
        found = inside[part]
    return found


def _split(full: str) -> str:
    """MODULE:NAME out of a full name; the longest module that there is."""
    parts = full.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            source_of(".".join(parts[:count]))
        except AssertionError:
            continue
        return f"{'.'.join(parts[:count])}:{'.'.join(parts[count:])}"
    raise AssertionError(f"{full} is gone")


def parameters(function: ast.FunctionDef) -> str:
    """(a, b=, *, c=, **d): names, and which have a default."""
    given = function.args
    plain = [*given.posonlyargs, *given.args]
    without = len(plain) - len(given.defaults)
    parts = [arg.arg + "=" * (number >= without) for number, arg in enumerate(plain)]
    if given.vararg or given.kwonlyargs:
        parts.append(f"*{given.vararg.arg if given.vararg else ''}")
    parts += [
        arg.arg + "=" * (value is not None)
        for arg, value in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    parts += [f"**{given.kwarg.arg}"] if given.kwarg else []
    return f"({', '.join(parts)})"


def described(theirs: str) -> str:
    """What stands at `theirs`, in the words of Touch.expected."""
    if theirs.startswith("torch.ops:"):  # defined in C++
        import torch

        operator = torch.ops
        for part in theirs.partition(":")[2].split("."):
            operator = getattr(operator, part)
        return f"({', '.join(argument.name for argument in operator.default._schema.arguments)})"
    found = definition(theirs)
    if isinstance(found, ast.FunctionDef):
        return parameters(found)
    if isinstance(found, ast.ClassDef):
        fields = [
            item.target.id
            for item in found.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        ]
        return FIELDS + ", ".join(fields)
    return BOUND


@pytest.mark.parametrize("touch", [*TOUCHES, *RELIED_ON], ids=lambda touch: f"{touch.file}: {touch.theirs}")
def test_the_name_is_what_we_rely_on(touch: Touch) -> None:
    """Catches: a release of theirs in which a name is gone or takes other parameters, met in the middle of a
    save."""
    if touch.name.startswith(LIBRARIES):  # where we use the name, if that is not where it is defined
        definition(_split(touch.name))
    if touch.expected.startswith(SOURCE):
        text = touch.expected.removeprefix(SOURCE)
        assert text in source_of(touch.theirs.partition(":")[0]), f"{touch.theirs} has no {text!r}"
    elif touch.expected == BOUND:
        definition(touch.theirs)
    else:
        assert described(touch.theirs) == touch.expected


def test_installed_versions_are_those_that_were_checked() -> None:
    """Catches: a new release installed, and nobody has looked at the table."""
    found = {name: version(name) for name in CHECKED_VERSIONS}
    wrong = {
        name: found[name] for name, checked in CHECKED_VERSIONS.items() if not found[name].startswith(checked)
    }
    assert not wrong, f"checked on {CHECKED_VERSIONS}, installed {wrong}: go through the table"


def own_names() -> set[str]:
    """Private names that our own source defines: functions, classes, variables, attributes of self."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                    found.add(node.attr)
    return {name for name in found if _private(name)}


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


class Scan:
    """The names of theirs that one file of ours reaches for."""

    def __init__(self, path: Path, own: set[str]) -> None:
        self.file = path.relative_to(PACKAGE).as_posix()
        self.own = own
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.names: dict[str, str] = {}  # of this file -> full name
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.names[alias.asname or alias.name.partition(".")[0]] = (
                        alias.name if alias.asname else alias.name.partition(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom) and node.module:
                self.names |= {
                    alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
                }
        for node in ast.walk(self.tree):  # cuda = torch.cuda
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                full = self._full(node.value)
                if full and full.partition(".")[0] in LIBRARIES and isinstance(node.value, ast.Attribute):
                    self.names[node.targets[0].id] = full

    def _full(self, node: ast.expr) -> str | None:
        """The full name of `a.b.c`, if `a` is imported."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            before = self._full(node.value)
            return before and f"{before}.{node.attr}"
        return None

    def touches(self) -> Iterator[str]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
                for alias in node.names:
                    if any(map(_private, f"{node.module}.{alias.name}".split("."))):
                        yield f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Attribute):
                yield from self._attribute(node)
            elif isinstance(node, ast.Call):
                yield from self._call(node)
            elif isinstance(node, ast.Constant) and self.file.startswith("upstream/"):
                if isinstance(node.value, str) and node.value.isidentifier() and self._foreign(node.value):
                    yield node.value

    def _attribute(self, node: ast.Attribute) -> Iterator[str]:
        full = self._full(node)
        top = full.partition(".")[0] if full else None
        if top in LIBRARIES and isinstance(node.ctx, ast.Store):
            yield str(full)  # replaced
        elif node.attr in ("__self__", "__func__", "__wrapped__", "__closure__", "__globals__"):
            yield node.attr
        elif not self._foreign(node.attr) or top in sys.stdlib_module_names:
            return
        else:
            yield full if top in LIBRARIES else node.attr

    def _call(self, node: ast.Call) -> Iterator[str]:
        called = node.func.id if isinstance(node.func, ast.Name) else ""
        if called not in ("getattr", "hasattr", "setattr", "delattr"):
            return
        full = self._full(node.args[0])
        if called in ("setattr", "delattr") and full and full.partition(".")[0] in LIBRARIES:
            yield f"{called} {full}"
        name = node.args[1]
        if isinstance(name, ast.Constant) and self._foreign(str(name.value)):
            yield str(name.value)

    def _foreign(self, name: str) -> bool:
        named_tuple = name in ("_replace", "_asdict", "_fields", "_make")
        return (
            _private(name)
            and name != "_"
            and name not in self.own
            and not named_tuple
            and not name.startswith("_dms")
        )


def scanned() -> set[tuple[str, str]]:
    own = own_names()
    return {
        (scan.file, name)
        for path in sorted(PACKAGE.rglob("*.py"))
        for scan in [Scan(path, own)]
        for name in scan.touches()
    }


def overridden() -> set[tuple[str, str]]:
    """The private methods of transformers that a class of hf/ or inference/ overrides."""
    theirs = {
        item.name
        for module in ("generation.utils", "modeling_utils", "cache_utils", "configuration_utils")
        for item in ast.walk(tree_of(f"transformers.{module}"))
        if isinstance(item, ast.FunctionDef) and _private(item.name)
    }
    return {
        (path.relative_to(PACKAGE).as_posix(), item.name)
        for room in ("hf", "inference")
        for path in sorted((PACKAGE / room).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.FunctionDef) and item.name in theirs
    }


def test_the_table_is_complete() -> None:
    """Catches: a private name that somebody reaches for and lists nowhere, and a row that nobody needs any
    more."""
    found = scanned() | overridden()
    listed = {(touch.file, touch.used) for touch in TOUCHES}
    assert found - listed == set(), "used, and not in TOUCHES"
    assert listed - found == set(), "in TOUCHES, and not used"


def test_the_files_are_there() -> None:
    """Catches: a row about a file that was moved or removed."""
    assert {touch.file for touch in RELIED_ON if not (PACKAGE / touch.file).is_file()} == set()


def test_they_are_touched_in_one_room() -> None:
    """hf/ is copied into exports and stands alone; inference/ derives its models from it.

    Catches: a private name used outside upstream/.
    """
    elsewhere = {touch.file for touch in TOUCHES} - {
        touch.file for touch in TOUCHES if _may_touch(touch.file)
    }
    assert elsewhere == set()


def _may_touch(file: str) -> bool:
    return file.partition("/")[0] in ("upstream", "hf", "inference")


SAMPLE = """
import torch
from megatron.core import training
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel as Base
import os

cuda = torch.cuda
cuda.synchronize = print
training.save = None
setattr(cuda, "Event", None)
torch.serialization._get_layout("strided")
os._exit(0)
step = Base._from_config(1).scale.__self__
getattr(step, "_hidden")._replace(x=1)
step._known, step.visible
"""


def test_the_scan_sees_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a way of reaching for a name that the scan is blind to, and false alarms."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / "sample.py"
    path.write_text(SAMPLE)
    assert sorted(Scan(path, own={"_known"}).touches()) == [
        "__self__",
        "_hidden",
        "megatron.core.training.save",
        "setattr torch.cuda",
        "torch.cuda.synchronize",
        "torch.serialization._get_layout",
        "torch.utils._pytree.tree_leaves",
        "transformers.PreTrainedModel._from_config",
    ]
