"""One row of input → a chat or a text, whatever form the row has.

Forms: "messages" (OpenAI, Hugging Face), "conversations" (ShareGPT), "text", and "prompt" with "completion"
(texts, or lists of messages). `--field` names other columns. A column that is null counts as absent.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from megatron_dms.data.chat_messages import as_messages, checked_list
from megatron_dms.data.line_error import LineError, require_text

_FORMS = (("messages",), ("conversations",), ("text",), ("prompt", "completion"))
# Columns beside the messages that are part of the chat.
_TOOLS = ("tools", "functions")
_SYSTEM = ("system", "system_prompt")
_DOCUMENTS = "documents"
_OPTIONS = "chat_template_kwargs"


@dataclass
class Chat:
    """Messages, and what a template is given beside the messages."""

    messages: list[dict[str, Any]]
    targets: list[bool]
    """Whether the model is to learn to say each message."""
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as enable_thinking."""
    weighted: bool = False
    """Whether some message has weight 0."""


@dataclass
class Text:
    """A text as it stands."""

    prompt: str
    """What the model is given; no target."""
    completion: str


@dataclass
class Parsed:
    """A row that was understood."""

    document: Chat | Text
    left_out: list[str]
    """What of the row goes into no token, by name."""


def parse(row: bytes | dict[str, Any], fields: tuple[str, ...], dropped: frozenset[str]) -> Parsed:
    """Parse one row.

    Args:
        fields: the columns to read: none (the known forms), one, or a prompt's and a completion's.
        dropped: names of columns and of fields of messages to leave out and count.

    Raises:
        LineError: the row has no known form.
    """
    given = _object(row)
    left_out = [f"column {name}" for name in dropped & given.keys() if given[name] is not None]
    columns = {name: value for name, value in given.items() if value is not None and name not in dropped}
    form = fields or _form(columns, given)
    values = [columns.get(name) for name in form]
    if None in values:
        raise LineError(f"found the fields {_names(given)}, expected {' and '.join(form)}; check --field")
    used = set(form)
    document: Chat | Text
    if form == ("text",) or (form not in _FORMS[:2] and isinstance(values[0], str)):
        for name, value in zip(form, values, strict=True):
            require_text(value, f'"{name}"')
        document = Text("" if len(values) == 1 else str(values[0]), str(values[-1]))
    else:
        document = _chat(form, values, columns, used, dropped, left_out)
    left_out += [f"column {name}" for name in columns if name not in used]
    return Parsed(document, left_out)


def _object(row: bytes | dict[str, Any]) -> dict[str, Any]:
    if isinstance(row, dict):
        return row
    try:
        document = json.loads(row)
    except UnicodeDecodeError as error:
        raise LineError(
            f"found bytes that are not UTF-8 ({error.reason}), expected UTF-8; convert the file"
        ) from error
    except json.JSONDecodeError as error:
        raise LineError(
            f"found no JSON ({error.msg} at character {error.pos + 1}), expected one object per line; mend "
            "or delete it"
        ) from error
    except (RecursionError, ValueError) as error:  # thousands of brackets; a number of thousands of digits
        raise LineError(
            f"found JSON that cannot be read ({str(error)[:80]}); mend or delete the line"
        ) from error
    if not isinstance(document, dict):
        raise LineError(
            f"found a JSON {type(document).__name__}, expected an object; mend or delete the line"
        )
    return document


def _names(columns: dict[str, Any]) -> str:
    return ", ".join(sorted(columns)) or "none"


def _form(columns: dict[str, Any], given: dict[str, Any]) -> tuple[str, ...]:
    found = [form for form in _FORMS if columns.keys() >= set(form)]
    if not found:
        raise LineError(
            f'found the fields {_names(given)}, expected "messages", "conversations", "text", or "prompt" '
            'and "completion"; name the columns with --field, or rename them'
        )
    if len(found) > 1:
        raise LineError(
            f"found the fields {_names(columns)}, expected either {' or '.join(map(' and '.join, found))}; "
            f"say which one with --field {' '.join(found[0])}"
        )
    return found[0]


def _from_json(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _chat(
    form: tuple[str, ...],
    values: list[Any],
    columns: dict[str, Any],
    used: set[str],
    dropped: frozenset[str],
    left_out: list[str],
) -> Chat:
    lists = [checked_list(_from_json(value), f'"{name}"') for name, value in zip(form, values, strict=True)]
    # Of a prompt with a completion, the completion alone is what the model is to learn.
    first = len(lists[0]) if len(lists) > 1 else 0
    messages, counts = as_messages([message for part in lists for message in part], dropped, left_out)
    targets = [
        m["role"] == "assistant" and count and k >= first
        for k, (m, count) in enumerate(zip(messages, counts, strict=True))
    ]
    for name in _SYSTEM:
        if isinstance(columns.get(name), str):
            used.add(name)
            system = {"role": "system", "content": columns[name]}
            require_text(columns[name], f'"{name}"')
            if columns[name].strip() and messages[0] != system:
                messages, targets = [system, *messages], [False, *targets]
    chat = Chat(messages, targets, weighted=not all(counts))
    for name in _TOOLS:
        if name in columns:
            used.add(name)
            chat.tools = [*(chat.tools or []), *_tools(columns[name], name)] or None
    if _DOCUMENTS in columns:
        used.add(_DOCUMENTS)
        chat.documents = _objects(columns[_DOCUMENTS], _DOCUMENTS)
    if _OPTIONS in columns:
        used.add(_OPTIONS)
        options = _from_json(columns[_OPTIONS])
        if not isinstance(options, dict):
            raise LineError(
                f'"{_OPTIONS}": found {type(options).__name__}, expected an object; mend the line'
            )
        chat.options = options
    return chat


def _objects(value: Any, name: str) -> list[dict[str, Any]]:
    value = _from_json(value) if value != "" else []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise LineError(
            f'"{name}": found no list of objects, expected one; mend the line, or --drop-field {name}'
        )
    return value


def _tools(value: Any, name: str) -> list[dict[str, Any]]:
    """Return the tools as templates expect tools: each a {"type": "function", "function": …}."""
    tools = _objects(value, name)
    return [tool if "function" in tool or name == "tools" else _wrapped(tool) for tool in tools]


def _wrapped(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": function}
