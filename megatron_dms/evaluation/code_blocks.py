r"""Find the Python program in a generated text, however its fences are written."""

import ast
import re
import textwrap
import warnings
from dataclasses import dataclass

from megatron_dms.evaluation.answer_text import visible

_FENCE = re.compile(r"^(?P<before>.*?)(?P<fence>`{3,}|~{3,})(?P<info>[^`~\n]*)$", re.DOTALL)
_PYTHON = re.compile(r"\{?\.?(?:[ic]?python|pypy|py)-?[\d.]*(?![\w-])", re.IGNORECASE)
_TAG = re.compile(r"\{?\.?[A-Za-z][\w+#.-]*\}?(?:\s*[\d.]+|\s*\{.*|:\S*|,.*|\s+\w+=.*)?\s*$", re.DOTALL)
_UNTAGGED = ("", "code", "text", "txt", "plain", "plaintext", "script", "source")
_OF_BLOCKS = ("markdown", "md")
_DATA = re.compile(r"[\s\d.,:\[\]()\"'-]*")
# Other marks of code, written as fences.
_MARKS = (
    (re.compile(r"^[ \t]*\[PYTHON\][ \t]*$", re.MULTILINE), "```python"),
    (re.compile(r"^[ \t]*\[/PYTHON\][ \t]*$", re.MULTILINE), "```"),
    (re.compile(r"^[ \t]*(?:<pre(?:\s[^>\n]*)?>)?<code(?:\s[^>\n]*)?>[ \t]*$", re.MULTILINE), "```python"),
    (re.compile(r"^[ \t]*</code>(?:</pre>)?[ \t]*$", re.MULTILINE), "```"),
    (
        re.compile(
            r"^[ \t]*\\begin\{(?:verbatim|lstlisting|minted)\}(?:\[[^\]]*\])?(?:\{\w+\})?[ \t]*$",
            re.MULTILINE,
        ),
        "```python",
    ),
    (re.compile(r"^[ \t]*\\end\{(?:verbatim|lstlisting|minted)\}[ \t]*$", re.MULTILINE), "```"),
)
_SESSION = re.compile(r"\s*(?:>>>|\$ |In \[\d+\]:)")
_MOST_CLOSINGS = 20  # that are tried for one block


@dataclass(frozen=True)
class _Block:
    tag: str
    body: str


def extract_code(text: str) -> str | None:
    """Return the last fenced block tagged python (python3, py, ...), or else the last block without a tag.

    Thoughts do not count (see `visible` in answer_text.py). A fence has three or more backquotes or tildes;
    text may follow the closing fence, and a line of code may precede it. A fence within a string of the
    program is part of the program. Sessions (>>>) and blocks that only use a function of an earlier block are
    passed over. A block that is never closed does not count, for example where the text was cut, unless
    there is no other, the text ends with a line, and the block is a program. The same holds for a program
    that has a closing fence only.
    """
    text = visible(text)
    for mark, fence in _MARKS:
        text = mark.sub(fence, text)
    lines = text.splitlines(keepends=True)
    blocks, rest = _blocks(lines)
    tagged = [block.body for block in blocks if _PYTHON.match(block.tag)]
    untagged = [block.body for block in blocks if block.tag.lower() in _UNTAGGED]
    for found in (tagged, untagged):
        if found:
            return _program(found)
    return rest


def _blocks(lines: list[str]) -> tuple[list[_Block], str | None]:
    """Return the complete blocks, and a program whose block has one fence only."""
    blocks: list[_Block] = []
    rest: str | None = None
    index = 0
    while index < len(lines):
        opening = _opening(lines[index])
        if opening is None:
            index += 1
            continue
        tag = opening["info"].strip()
        end, body, next_index = _closing(lines, index, opening["fence"])
        if end and tag.lower() in _OF_BLOCKS:
            blocks += _blocks(body.splitlines(keepends=True))[0]
        elif end:
            blocks.append(_Block(tag, body))
        elif next_index == len(lines):
            below = textwrap.dedent("".join(lines[index + 1 :]))
            above = textwrap.dedent("".join(lines[:index]))
            if below.endswith("\n") and _is_program(below) and (not tag or _PYTHON.match(tag)):
                rest = below
            elif not blocks and not tag:
                rest = _end_that_is_a_program(above.splitlines(keepends=True))
        index = next_index
    return blocks, rest


def _opening(line: str) -> re.Match[str] | None:
    found = _FENCE.match(line.rstrip("\r\n"))
    if found is None or (found["before"].strip(" \t>") and not _PYTHON.match(found["info"])):
        return None
    return found


def _closing(lines: list[str], start: int, fence: str) -> tuple[bool, str, int]:
    """Find where the block that opens at `start` ends.

    Returns:
        whether it ends, its body, and the line that comes after it.
    """
    first: tuple[bool, str, int] | None = None
    cut: int | None = None  # the line of another opening: the block was cut before it
    tried = 0
    for index in range(start + 1, len(lines)):
        found = _FENCE.match(lines[index].rstrip("\r\n"))
        if found is None or found["fence"][0] != fence[0] or len(found["fence"]) < len(fence):
            continue
        before, info = found["before"], found["info"]
        if not before.strip() and info and not info[0].isspace() and _TAG.match(info):
            cut = index if cut is None and first is None else cut
            continue
        if before.lstrip().startswith("#") or (before.strip() and info and not re.match(r"\s+\w|\s*$", info)):
            continue
        body = textwrap.dedent("".join([*lines[start + 1 : index], before if before.strip() else ""]))
        tried += 1
        if tried <= _MOST_CLOSINGS and _tree(body) is not None:
            return True, body, index + 1
        if first is None and cut is None and not (before.strip() and info.strip()):
            first = (True, body, index + 1)
    if first is not None:
        return first
    return False, "", len(lines) if cut is None else cut


def _tree(body: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _is_program(body: str) -> bool:
    """Whether a text is Python that does something: prose of one word is Python, too."""
    tree = _tree(body)
    return tree is not None and any(not _is_word(node) for node in tree.body)


def _is_word(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, (ast.Name, ast.Constant, ast.Tuple))


def _is_value(node: ast.stmt) -> bool:
    """Whether a line is only a number, a text or a list: what a program prints."""
    kinds = (ast.Constant, ast.Tuple, ast.List, ast.UnaryOp)
    return isinstance(node, ast.Expr) and isinstance(node.value, kinds)


def _end_that_is_a_program(lines: list[str]) -> str | None:
    for start in range(min(len(lines), 400)):
        body = "".join(lines[start:])
        if lines[start].strip() and not lines[start][0].isspace() and _is_program(body):
            return body
    return None


def _program(bodies: list[str]) -> str:
    """Return the last body that is neither a session nor an example of how an earlier one is used."""
    for index in range(len(bodies) - 1, 0, -1):
        body = bodies[index]
        tree = _tree(body)
        values = tree is not None and all(map(_is_value, tree.body))
        if values or _SESSION.match(body) or _DATA.fullmatch(body):
            continue
        if tree is not None and _missing(tree) & _functions(bodies[:index]):
            continue
        return body
    return bodies[0]


def _functions(bodies: list[str]) -> set[str]:
    """Return the functions and classes that programs define."""
    trees = [tree for body in bodies if (tree := _tree(body)) is not None]
    kinds = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    return {node.name for tree in trees for node in tree.body if isinstance(node, kinds)}


def _missing(tree: ast.Module) -> set[str]:
    """Return the names that a program uses and gives to nothing."""
    used: set[str] = set()
    given: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else given).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            given.add(node.name)
        elif isinstance(node, ast.arg):
            given.add(node.arg)
        elif isinstance(node, ast.alias):
            given.add((node.asname or node.name).partition(".")[0])
    return used - given
