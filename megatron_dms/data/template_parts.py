"""Whether a chat template writes every part of a chat, and where in the rendered text.

A template is a program: it may drop a role, a field, or whatever stands before </think>. So the chat is
rendered a second time with a mark before and after every string of it, each mark a character that no text
uses. What lies between the two marks must be the string. A string said twice or in the template's own words
is thus no excuse for one that is dropped.

Marks stand inside of what templates look at: blanks and tags at both ends of a string stay outside of the
marks, because templates strip the blanks and search for the tags (<think>, <tool_response>).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_FIRST_MARK = 0x100000  # the second private use area: two marks for each part, and no other use known
LIMIT = 0xFFFE // 2
_MARK = re.compile("[\U00100000-\U0010ffff]")
# As JSON in ASCII and as Python write such a character.
_ESCAPED_MARK = re.compile(r"\\u(db[c-f][0-9a-f])\\u(d[c-f][0-9a-f]{2})|\\U0010([0-9a-f]{4})", re.IGNORECASE)
_LEAD = re.compile(r"(?:\s|<[^<>\s]{1,40}>)*")
_TAG_AT_END = re.compile(r"<[^<>\s]{1,40}>$")
_LONGEST_TAG = 42

# Keys that say how the rest is to be read; what they hold is written in a template's own words.
_STRUCTURE = frozenset({"role", "type", "$schema", "format", "required", "strict", "additionalProperties"})
# Fields that tie messages to each other and to a server's records, and say nothing. No template must write
# them.
_RECORDS = frozenset({"id", "index", "tool_call_id", "name", "call_id"})
TOOLS = -1
"""The "message" of a part that belongs to the tools or documents."""


class Part(NamedTuple):
    """One string of a chat."""

    message: int
    """Index of the message, or TOOLS."""
    name: str
    """Where the string stands: "content", "tool_calls.function.arguments" …"""
    lead: str
    """Blanks and tags at the beginning, before the mark."""
    core: str
    trail: str
    must: bool
    """Whether a line that loses the string is refused, and not counted only."""


class _Parts(list[Part]):
    """The parts found so far."""

    def __init__(self, only: int | None) -> None:
        super().__init__()
        self.only = only

    def add(self, part: Part) -> int | None:
        """Add a part; return its first mark, or None if the part is to bear none."""
        self.append(part)
        k = len(self) - 1
        return _FIRST_MARK + 2 * k if self.only in (None, k) and k < LIMIT else None


class Place(NamedTuple):
    """Where a part stands in the rendered text, in characters."""

    begin: int
    core: int
    """Where the part begins without its lead."""
    end: int


def mark(chat: dict[str, Any], only: int | None = None) -> tuple[dict[str, Any], list[Part]]:
    """Return the chat with marks in all strings, and the strings.

    The names of a tool's parameters bear no mark, because templates look them up: see `parameter_names`.

    Args:
        chat: "messages", and "tools" and "documents" if there are any.
        only: mark this part and no other one.
    """
    parts = _Parts(only)
    marked: dict[str, Any] = {
        "messages": [
            {key: _marked(value, key, key, k, parts) for key, value in message.items()}
            for k, message in enumerate(chat["messages"])
        ]
    }
    for name in ("tools", "documents"):
        if chat.get(name):
            marked[name] = _marked(chat[name], name, name, TOOLS, parts)
    return marked, parts


def _marked(value: Any, key: str, path: str, message: int, parts: _Parts) -> Any:
    if isinstance(value, str):
        structure = key in _STRUCTURE and ".arguments" not in path
        if structure or not value.strip():
            return value
        lead, core, trail = _split(value)
        head = parts.add(Part(message, path, lead, core, trail, _must(key, path)))
        return value if head is None else f"{lead}{chr(head)}{core}{chr(head + 1)}{trail}"
    if isinstance(value, list):
        return [_marked(item, key, path, message, parts) for item in value]
    if isinstance(value, dict):
        marked = {}
        for name, item in value.items():
            new = _marked(item, name, f"{path}.{name}" if ".arguments" not in path else path, message, parts)
            # The names of arguments are the model's words too, and stand for numbers, which bear no mark.
            head = parts.add(Part(message, path, "", name, "", True)) if path.endswith(".arguments") else None
            marked[name if head is None else f"{name}{chr(head + 1)}"] = new
        return marked
    return value


def _must(key: str, path: str) -> bool:
    """Whether a string says something. A name does where it is a tool's, and an argument whatever its key."""
    if ".arguments" in path or path == "tool_calls.function.name" or path.startswith("documents"):
        return True
    if path.startswith("tools"):
        return key in ("name", "description", "enum")
    return key not in _RECORDS


def parameter_names(tools: Any) -> Iterator[str]:
    """Yield the names of all parameters of the tools."""
    if isinstance(tools, list):
        for tool in tools:
            yield from parameter_names(tool)
    elif isinstance(tools, dict):
        for key, value in tools.items():
            if key == "properties" and isinstance(value, dict):
                yield from value
            yield from parameter_names(value)


def _split(text: str) -> tuple[str, str, str]:
    """Split a text into blanks and tags before, the rest, and blanks and tags after."""
    found = _LEAD.match(text)
    begin = found.end() if found else 0
    if begin == len(text):  # nothing but tags
        begin = len(text) - len(text.lstrip())
        end = len(text.rstrip())
    else:
        end = len(text.rstrip())
        while tag := _TAG_AT_END.search(text, max(begin, end - _LONGEST_TAG), end):
            end = len(text[: tag.start()].rstrip())
    return text[:begin], text[begin:end], text[end:]


def locate(marked: str, parts: list[Part]) -> tuple[str, list[Place | None]]:
    """Find the parts in a text that was rendered from marked messages.

    Returns:
        The text without marks; and for each part its place in that text, or None for a part of which
        something is missing.
    """
    if "\\" in marked:
        marked = _ESCAPED_MARK.sub(_unescape, marked)
    positions: dict[int, int] = {}
    count = 0
    for count, found in enumerate(_MARK.finditer(marked), 1):
        positions.setdefault(ord(found[0]) - _FIRST_MARK, found.start() - count + 1)
    text = _MARK.sub("", marked) if count else marked
    return text, [_place(text, positions, k, part) for k, part in enumerate(parts)]


def _unescape(found: re.Match[str]) -> str:
    if found[3]:
        return chr(_FIRST_MARK + int(found[3], 16))
    return (bytes.fromhex(found[1]) + bytes.fromhex(found[2])).decode("utf-16-be")


def _place(text: str, positions: dict[int, int], k: int, part: Part) -> Place | None:
    end = positions.get(2 * k + 1)
    if end is None:
        return None
    core = positions.get(2 * k)
    if core is None:
        # The name of an argument has a mark at its end only, so that its place in a sorted object stays.
        core = end - len(part.core)
        return Place(core, core, end) if core >= 0 and text.startswith(part.core, core) else None
    if text[core:end] != part.core and not _same(text[core:end], part.core):
        return None
    begin = _before(text, core, part.lead) if part.lead.strip() else core
    after = _after(text, end, part.trail) if part.trail.strip() else end
    return Place(begin, core, after) if begin is not None and after is not None else None


def _same(found: str, text: str) -> bool:
    squeezed = _squeeze(found)
    return any(_squeeze(form) == squeezed for form in _forms(text))


def _squeeze(text: str) -> str:
    """Drop all blanks: templates strip, add and exchange them."""
    return "".join(text.split())


def _forms(text: str) -> Iterator[str]:
    """The ways in which templates write a string."""
    yield text
    quoted = json.dumps(text, ensure_ascii=False)
    yield quoted[1:-1]
    yield json.dumps(text)[1:-1]
    yield json.dumps(quoted[1:-1], ensure_ascii=False)[1:-1]
    yield repr(text)[1:-1]


def _before(text: str, position: int, lead: str) -> int | None:
    for form in _forms(lead):
        at = position
        for character in reversed(_squeeze(form)):
            at -= 1
            while at >= 0 and text[at].isspace():
                at -= 1
            if at < 0 or text[at] != character:
                break
        else:
            return at
    return None


def _after(text: str, position: int, trail: str) -> int | None:
    for form in _forms(trail):
        at = position
        for character in _squeeze(form):
            while at < len(text) and text[at].isspace():
                at += 1
            if at == len(text) or text[at] != character:
                break
            at += 1
        else:
            return at
    return None


def contained(text: str, part: Part) -> bool:
    """Whether a part stands anywhere in a text, for chats with more parts than marks."""
    squeezed = _squeeze(text)
    return any(_squeeze(form) in squeezed for form in _forms(part.lead + part.core + part.trail))
