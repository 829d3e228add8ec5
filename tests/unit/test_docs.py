"""Documents against the source: the paths, flags, make targets and tools that they name exist.

The rules are small functions of a text, tested on samples first, so that a document passes because it is
right and not because nothing in it was recognised.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from megatron_dms.arguments import add_dms_arguments
from megatron_dms.config import DMSConfig, flag_of
from tests.support.exported_models import export_with_tokenizer
from tests.support.tools import run_tool

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/**/README.md"))]

_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FLAG = re.compile(r"--dms-[a-z][a-z0-9-]*")
_MAKE = re.compile(r"(?:^|[;&|] *|\$ )make((?: [^\s#;&|]+)+)")
_PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_TOOL = re.compile(r"\btools/[A-Za-z0-9_]+\.py\b")
_PATH = re.compile(r"^\.?[A-Za-z0-9_][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_.*-]+)*/?$")
_SOURCE_ENDINGS = (
    ".py",
    ".md",
    ".toml",
    ".txt",
    ".sh",
    ".cfg",
    ".json",
    ".jsonl",
    ".png",
    ".sbatch",
    ".yaml",
)
_ROOT_ENDINGS = (".py", ".md", ".toml", ".txt", ".sh")  # a bare config.json is some checkpoint's
_TREE_ENTRY = re.compile(
    r"^(?P<indent>[ │├└─]*)(?P<names>[A-Za-z0-9_.*][A-Za-z0-9_./* -]*?)(?:\s{2,}.*|\s+#.*)?$"
)
# Folders that runs make: named in documents, absent from a fresh clone.
_MADE_BY_RUNS = ("out/", ".venv/", "wandb/", "data/")


def paths_named(text: str) -> set[str]:
    """Tokens in backticks that look like paths of the repository.

    That is: a top-level entry leads them, or they end like a source file (`nvidia/Qwen3-8B` is a hub name).
    """
    top = {entry.name for entry in ROOT.iterdir()}
    found = set()
    for token in (word for span in _SPAN.findall(_FENCE.sub("", text)) for word in span.split()):
        token = token.strip(",;:()\"'").removeprefix("./")
        if not _PATH.match(token) or token.startswith(_MADE_BY_RUNS):
            continue
        first, slash, _ = token.partition("/")
        endings = _SOURCE_ENDINGS if slash else _ROOT_ENDINGS
        if (slash and first in top) or token.endswith(endings):
            found.add(token.rstrip("/"))
    return found


def tree_named(text: str) -> set[str]:
    """Return the entries of the tree block: a fenced block whose entries are indented below folders that
    end in "/"."""
    found: set[str] = set()
    for block in _FENCE.findall(text):
        lines = [line for line in block.splitlines() if line.strip()]
        folders = [line for line in lines if re.match(r"^[ │├└─]*[A-Za-z0-9_.]+/(\s|$)", line)]
        if len(folders) < 2:
            continue
        above: list[tuple[int, str]] = []
        for line in lines:
            entry = _TREE_ENTRY.match(line)
            if entry is None:
                continue
            depth = len(entry["indent"])
            above = [(level, name) for level, name in above if level < depth]
            for name in entry["names"].split():
                if name == "…":
                    continue
                path = "".join(parent for _, parent in above) + name
                found.add(path.rstrip("/"))
                if name.endswith("/"):
                    above.append((depth, name))
    return found


def exists(path: str) -> bool:
    """Say whether a path, or a pattern, exists relative to the root or to the package, as
    `mcore/compression_account.py`."""
    return any(next(base.glob(path), None) is not None for base in (ROOT, ROOT / "megatron_dms"))


def make_targets_named(text: str) -> set[str]:
    """Return the words after `make` in code, without settings such as VENV=DIR.

    Prose is left out: it may "make sure" of something.
    """
    code = _SPAN.findall(_FENCE.sub("", text)) + [
        line for block in _FENCE.findall(text) for line in block.splitlines()
    ]
    words = [word for line in code for match in _MAKE.findall(line.strip()) for word in match.split()]
    return {word for word in words if "=" not in word and not word.startswith("-")}


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z][a-z0-9-]*):(?!=)", text, re.MULTILINE))


def dms_flags() -> set[str]:
    parser = argparse.ArgumentParser(add_help=False)
    add_dms_arguments(parser)
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--dms-")}


def placeholders(text: str) -> set[str]:
    """Return the figures that were to be filled in."""
    return set(re.findall(r"\b(?:DEMO|TEST|EXACTNESS)_[A-Z]+\b", text))


SAMPLE = """
Run `make demo` or `make install test VENV=x`; then `tools/preprocess_data.py --input x`. We
make progress. See `setup.py`, `megatron_dms/no_such.py`, `docs/none.md`, `W/L/CR`, `a/b-1.5B`, `config.json`
and `--dms-window 4`, `out/demo/x.json`.
```
setup.py pyproject.toml   # metadata
megatron_dms/
  training/     what surrounds the model
    step.py     forward step
    ghost.py    not there
tools/          command lines
```
```bash
cd megatron_dms && make lint  # make all sure
torchrun pretrain_dms.py --dms-final-cr 8
```
"""


def test_rules_on_a_sample() -> None:
    """Catches: a pattern that recognises nothing, with which every document would pass."""
    assert paths_named(SAMPLE) == {
        "tools/preprocess_data.py",
        "setup.py",
        "megatron_dms/no_such.py",
        "docs/none.md",
    }
    assert tree_named(SAMPLE) == {
        *("setup.py", "pyproject.toml", "megatron_dms", "megatron_dms/training", "tools"),
        *("megatron_dms/training/step.py", "megatron_dms/training/ghost.py"),
    }
    assert make_targets_named(SAMPLE) == {"demo", "install", "test", "lint"}
    assert set(_FLAG.findall(SAMPLE)) == {"--dms-window", "--dms-final-cr"}
    assert exists("megatron_dms/training/step.py") and not exists("megatron_dms/training/ghost.py")
    assert {"install", "test", "demo", "lint", "format", "clean", "help"} <= make_targets()
    assert "--dms-window" in dms_flags()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_things_exist(document: Path) -> None:
    """Catches: a document that names a path, make target or flag that is not there (any more)."""
    text = document.read_text(encoding="utf-8")
    missing = sorted(
        path for path in paths_named(text) | tree_named(text) if not _exists_beside(path, document)
    )
    assert not missing, f"{document.name} names paths that do not exist: {missing}"
    unknown = sorted(make_targets_named(text) - make_targets())
    assert not unknown, f"{document.name} names make targets that do not exist: {unknown}"
    of_tools = {
        flag for tool in ROOT.glob("megatron_dms/cli/*.py") for flag in _FLAG.findall(tool.read_text())
    }
    flags = sorted(set(_FLAG.findall(text)) - dms_flags() - of_tools)
    assert not flags, f"{document.name} names flags that do not exist: {flags}"
    links = [target.partition("#")[0] for target in _LINK.findall(text) if "://" not in target]
    broken = [target for target in links if not (document.parent / target).exists()]
    assert not broken, f"{document.name} links to what does not exist: {broken}"
    assert not placeholders(text), f"{document.name} lacks the figures of {placeholders(text)}"


def _exists_beside(path: str, document: Path) -> bool:
    return exists(path) or next(document.parent.glob(path), None) is not None


def test_every_flag_is_documented() -> None:
    """Catches: a --dms-* flag that neither README.md nor docs/flags.md names."""
    flags_page = ROOT / "docs" / "flags.md"
    texts = [
        page.read_text(encoding="utf-8") for page in (README, flags_page) if page == README or page.exists()
    ]
    named = set(_FLAG.findall("\n".join(texts)))
    missing = sorted(dms_flags() - named)
    assert not missing, f"flags named in neither README.md nor docs/flags.md: {missing}"


def test_every_tool_named_prints_its_help() -> None:
    """Every tools/x.py that there is, or that a document names, prints its help with exit status 0."""
    named = {tool for document in DOCUMENTS for tool in _TOOL.findall(document.read_text(encoding="utf-8"))}
    tools = sorted(
        named | {f"tools/{path.name}" for path in ROOT.glob("tools/*.py") if path.name != "__init__.py"}
    )
    assert tools
    for tool in tools:
        done = run_tool(tool, "--help", cwd=ROOT, process=True)
        assert done.status == 0 and "--help" in done.out, f"{tool} --help: {done.error or done.out}"


def test_flags_page_gives_every_default_and_choice() -> None:
    """Catches: a default or a choice that has changed since docs/flags.md was written."""
    rows = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8").splitlines()
    for item in fields(DMSConfig):
        (row,) = [row for row in rows if row.startswith(f"| `{flag_of(item.name)}` |")]
        default = "none" if item.default is None else item.default
        assert row.split("|")[2].strip() == str(default), row
        assert all(choice in row for choice in item.metadata["choices"] or ()), row


def test_the_inference_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs every Python block in order, on a tiny model that evicts; the flags of the page's command lines
    exist.

    Catches: an example that the exported model, or this version of transformers, does not run.
    """
    page = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8")
    blocks = _PYTHON.findall(page)
    (folder,) = set(re.findall(r'^folder = "(.*)"$', page, re.MULTILINE))
    tokenizer = (
        export_with_tokenizer(tmp_path / folder, max_position_embeddings=4096) / "tokenizer_config.json"
    )
    inputs = {"model_input_names": ["input_ids", "attention_mask"]}  # as those of real models say
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | inputs))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, f"docs/inference.md: {block}", "exec"), names)
    assert len(blocks) >= 8 and names["stats"].achieved_cr > 1.5

    done = run_tool("evaluate", "cost", "--help")
    assert done.status == 0, done.error
    known = done.out
    (used,) = re.findall(r"^python tools/evaluate.py cost (.*?[^\\])\n", page, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"--[a-z-]+", used)) <= set(re.findall(r"--[a-z-]+", known))
