"""The page of the architecture is as new as the source, and rooms import each other one way."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def architecture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "scripts" / "architecture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_as_new_as_the_source(architecture: ModuleType) -> None:
    """Catches: a module that the tree lacks, one that is gone, an import that the drawing does not show."""
    assert architecture.PAGE.read_text(encoding="utf-8") == architecture.page(), (
        "docs/architecture.md is out of date: python scripts/architecture.py --write"
    )


def test_every_module_says_what_it_is(architecture: ModuleType) -> None:
    """Catches: a module or a room without a docstring, which the tree would show bare."""
    assert len(architecture.modules()) > 100
    files = [*architecture.modules(), *architecture.PACKAGE.rglob("__init__.py")]
    assert [path for path in files if not architecture.summary(path)] == []


def test_rooms_import_each_other_one_way(architecture: ModuleType) -> None:
    """Catches: two rooms that import each other, directly or by way of others; and what ops and hf import."""
    arrows = architecture.arrows()
    assert arrows["ops"] == set() and arrows["hf"] == set()
    settled: set[str] = set()
    while rest := {room: used - settled for room, used in arrows.items() if room not in settled}:
        free = {room for room, used in rest.items() if not used}
        assert free, f"a circle among {rest}"
        settled |= free
